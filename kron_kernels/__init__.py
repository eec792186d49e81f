"""Kronecker-factored linear layers: the product, its gradients, and compressed encoders built on them."""

from ._backends import available as available_backends
from ._explain import explain
from ._version import __version__
from .addmm import kron_addmm, kron_addmm_
from .functional import kron_matmul
from .fused import AddNorm, kron_embedding, kron_ffn, kron_matmul_norm, kron_qkv, pack_factors
from .transform import kron_matmul_int8

__all__ = [
    "AddNorm",
    "__version__",
    "available_backends",
    "explain",
    "kron_addmm",
    "kron_addmm_",
    "kron_embedding",
    "kron_ffn",
    "kron_matmul",
    "kron_matmul_int8",
    "kron_matmul_norm",
    "kron_qkv",
    "pack_factors",
]
