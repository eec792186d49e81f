"""Kronecker-factored linear layers: the product, its gradients, and compressed encoders built on them."""

from ._backends import available as available_backends
from ._version import __version__
from .functional import kron_matmul

__all__ = ["__version__", "available_backends", "kron_matmul"]
