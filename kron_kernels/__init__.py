"""Kronecker-factored linear layers: the product, its gradients, and compressed encoders built on them."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("kron_kernels")
except PackageNotFoundError:  # a source tree that is on the path without being installed
    __version__ = "0+unknown"

from .backends import available as available_backends
from .backends.explain import explain
from .ops import (
    AddNorm,
    kron_addmm,
    kron_addmm_,
    kron_embedding,
    kron_ffn,
    kron_matmul,
    kron_matmul_norm,
    kron_qkv,
    pack_factors,
)

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
    "kron_matmul_norm",
    "kron_qkv",
    "optimize_for_inference",
    "pack_factors",
]


def __getattr__(name: str) -> Any:
    if name == "optimize_for_inference":  # imports transformers
        from .models.inference import optimize_for_inference

        return optimize_for_inference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
