"""Checkpoints of transformers' Trainer that are known to be whole by a marker, the last file written to each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..compress.files import sync, write_text

_MARKER = "complete.json"


def step_of(checkpoint: Path) -> int:
    """The step of ``checkpoint-N``."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find(folder: Path) -> list[Path]:
    """Those in the folder, whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """The marker, None where there is none or a file lacks, in whole or in part."""
    try:
        marker = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
        whole = all((checkpoint / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError):
        return None
    return marker if whole else None


def mark_complete(checkpoint: Path, metrics: int) -> None:
    """Write the marker once everything in the checkpoint is on the disk; ``metrics`` lines were logged before it."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.name != _MARKER:
            sync(path)
            if path.is_file():
                files[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    sync(checkpoint)
    marker = {"step": step_of(checkpoint), "metrics": metrics, "files": files}
    write_text(checkpoint / _MARKER, json.dumps(marker, indent=2) + "\n")


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, whole or not."""
    # The marker first: a process killed halfway must not leave it on a checkpoint without its weights.
    (checkpoint / _MARKER).unlink(missing_ok=True)
    sync(checkpoint)
    shutil.rmtree(checkpoint)
