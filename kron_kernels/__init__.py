"""Kronecker-factored linear layers: the product, its gradients, and compressed encoders built on them.

Public names are imported when they are first used: importing the package imports neither torch nor transformers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import available as available_backends
    from .backends.explain import explain
    from .models.inference import optimize_for_inference
    from .ops import (
        AddNorm,
        kron_addmm,
        kron_addmm_,
        kron_embedding,
        kron_ffn,
        kron_matmul,
        kron_matmul_norm,
        kron_qkv,
    )

try:
    __version__ = version("kron_kernels")
except PackageNotFoundError:  # a source tree that is on the path without being installed
    __version__ = "0+unknown"

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
]

# Where the names come from that are not functions of kron_kernels.ops: module and name there.
_ELSEWHERE = {
    "available_backends": ("backends", "available"),
    "explain": ("backends.explain", "explain"),
    "optimize_for_inference": ("models.inference", "optimize_for_inference"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _ELSEWHERE.get(name, ("ops", name))
    globals()[name] = value = getattr(import_module(f".{module}", __name__), original)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
