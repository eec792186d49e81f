"""Commands that need libraries beyond those of the package itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import of a library into a RuntimeError that tells which extra of the package brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "kron_kernels"):
            raise
        raise RuntimeError(f"the library {library!r} is not installed: pip install 'kron_kernels[{extra}]'") from error
