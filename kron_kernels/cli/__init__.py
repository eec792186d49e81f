"""The command line: ``kron-kernels env``, ``compress``, ``export`` and ``bench``."""

from .main import main

__all__ = ["main"]
