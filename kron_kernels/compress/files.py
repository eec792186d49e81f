"""Files that are there whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all: a process killed in between leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill, which takes the place of ``path`` once the block is through.

    Its files have the permissions of any new file then: safetensors keeps its own to the owner.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    # What a killed process left.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        for entry in (*partial.rglob("*"), partial):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
            sync(entry)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


def check_space(path: str | os.PathLike[str], bytes_needed: int, what: str) -> None:
    """OSError (ENOSPC) unless ``bytes_needed`` are free where ``path`` is, or will be; ``what`` begins the message."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise NoSpaceError(f"{what}: expected {_size(bytes_needed)} free at {place}, got {_size(free)}")


class NoSpaceError(OSError):
    """A full disk, told in one sentence; ``errno`` is ENOSPC."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
