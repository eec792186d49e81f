"""Name the extra of the package that brings a missing library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import of a library into a RuntimeError that names the extra of the package with it."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "kron_kernels"):
            raise
        raise RuntimeError(f"the library {library!r} is not installed: pip install 'kron_kernels[{extra}]'") from error
