"""Files and folders that are there whole or not at all, and disks that are full."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".kron_kernels-partial"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all: a process killed in between leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill, which takes the place of ``path`` when the block ends.

    The folder belongs to this call alone. ``replace`` exchanges it for a folder at ``path`` in one step where the
    system can (Linux), else by two renames: a process killed at any moment leaves the old folder or the new one, whole.
    The next call removes what killed ones left. The files get the permissions of any new file: safetensors keeps its
    own to the owner.

    Raises FileExistsError where ``path`` is a file or a link, or without ``replace`` a folder that is not empty;
    NoSpaceError for a full disk.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = _locked_folder(path)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        for entry in (*partial.rglob("*"), partial):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
            sync(entry)
        _move(partial, path, replace)
        sync(path.parent)
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise NoSpaceError(f"{path}: the disk is full; free some space and run again") from error
        raise
    finally:
        # The old folder after an exchange, else what was not finished.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Remove the temporary folders that killed processes left for ``path``; make one and lock it for this process."""
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        # Between the making of a folder and its lock nobody may take it for one that was left.
        _lock(parent, wait=True)
        for entry in path.parent.iterdir():
            if entry.name.startswith(f".{path.name}.") and entry.name.endswith(_PARTIAL) and not entry.is_symlink():
                left = os.open(entry, os.O_RDONLY)
                try:
                    if _lock(left, wait=False):
                        shutil.rmtree(entry, ignore_errors=True)
                finally:
                    os.close(left)
        partial = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
        descriptor = os.open(partial, os.O_RDONLY)
        _lock(descriptor, wait=False)
        return Path(partial), descriptor
    finally:
        os.close(parent)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock an open folder until it is closed; False where another process has it, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _move(partial: Path, path: Path, replace: bool) -> None:
    """Put ``partial`` in the place of ``path``; what was there is then at ``partial``."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"{path}: expected a folder to replace, got a {'link' if path.is_symlink() else 'file'}")
    if replace and path.exists():
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        names = (_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE)
        if rename is not None and rename(*names) == 0:
            return
        aside = partial.with_suffix(".old")
        os.rename(path, aside)
        os.rename(partial, path)
        os.rename(aside, partial)
        return
    try:
        os.rename(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"{path}: another process made it in the meantime") from error
        raise


def check_space(path: str | os.PathLike[str], bytes_needed: int, what: str) -> None:
    """Raise NoSpaceError unless ``bytes_needed`` are free where ``path`` is or will be; ``what`` begins the message."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise NoSpaceError(f"{what}: expected {_size(bytes_needed)} free at {place}, got {_size(free)}")


class NoSpaceError(OSError):
    """A full disk, described in one sentence; ``errno`` is ENOSPC."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
