"""Public functions: cast, check, choose the backend, and differentiate. One file an op, named as its schema's."""

from .addmm import kron_addmm, kron_addmm_
from .embedding import kron_embedding
from .ffn import kron_ffn
from .frozen_linear import frozen_linear_kron
from .matmul import kron_matmul
from .norm import AddNorm, kron_matmul_norm
from .qkv import kron_qkv

__all__ = [
    "AddNorm",
    "frozen_linear_kron",
    "kron_addmm",
    "kron_addmm_",
    "kron_embedding",
    "kron_ffn",
    "kron_matmul",
    "kron_matmul_norm",
    "kron_qkv",
]
