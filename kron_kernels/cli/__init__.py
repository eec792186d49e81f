"""The command line ``kron-kernels``, also ``python -m kron_kernels``."""

from .main import main

__all__ = ["main"]
