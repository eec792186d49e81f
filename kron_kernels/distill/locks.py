"""Files that one process holds until it ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

Lock = tuple[int, int, int]  # process, device, inode
_HELD: dict[Lock, BinaryIO] = {}


def acquire(path: Path) -> Lock:
    """Make the file where there is none and lock it for this process, which may have it already.

    Raises:
        BlockingIOError: another process has it.
    """
    path.touch()
    lock = (os.getpid(), path.stat().st_dev, path.stat().st_ino)
    # Closing any descriptor of a file gives up the process's lock on it, so each is opened once and stays open; forked
    # processes do not inherit it.
    if lock in _HELD:
        return lock
    file = open(path, "ab")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise BlockingIOError(f"run: another process is at work in {path.parent}") from None
    _HELD[lock] = file
    return lock


def release(lock: Lock) -> None:
    """Give the lock up; the file may be gone."""
    _HELD.pop(lock).close()
