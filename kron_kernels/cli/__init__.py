"""The command line: ``kron-kernels env``, ``compress`` and ``bench``."""

from .main import main

__all__ = ["main"]
