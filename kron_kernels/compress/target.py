"""The folder that a compressed model is written to: what may be replaced, checked before the work begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

REPORT_NAME = "compression_report.json"


def is_compressed(folder: Path) -> bool:
    """Tell whether ``folder`` holds a report of ``compress`` or a KronBert configuration."""
    if (folder / REPORT_NAME).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "kron_bert"


def check_target(
    target: str | os.PathLike[str], overwrite: bool, sources: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """Return the absolute path of a folder to write, once nothing that is needed can be lost by it.

    Only an empty folder or one that ``is_compressed`` may be replaced, and none that holds one of ``sources``: files,
    or folders with their files, links followed.

    Raises:
        FileExistsError: a file, a link, a folder of something else, or any folder without ``overwrite``.
        NotADirectoryError, PermissionError: the folder around it is a file, or cannot be written.
        ValueError: a source lies in it.
    """
    path = Path(os.path.abspath(target))
    if path.is_symlink():
        raise FileExistsError(f"out: expected a folder, got the link {path}; give the folder it points to")
    around = next(parent for parent in path.parents if parent.exists())
    if not around.is_dir():
        raise NotADirectoryError(f"out: expected a folder around {path}, got the file {around}")
    if not os.access(around, os.W_OK | os.X_OK):
        raise PermissionError(f"out: {around} cannot be written")
    if not path.exists():
        return path
    if not path.is_dir():
        raise FileExistsError(f"out: expected a folder, got the file {path}")
    if any(path.iterdir()):
        if not is_compressed(path):
            raise FileExistsError(f"out: {path} holds something else than a compressed model; choose another folder")
        if not overwrite:
            raise FileExistsError(f"out: {path} exists; pass --force (overwrite=True) to replace it")
    for source in sources:
        for file in _files(Path(source)):
            if path.resolve() in (file.resolve(), *file.resolve().parents):
                raise ValueError(f"out: {path} holds {file}, which is needed; choose another folder")
    return path


def _files(path: Path) -> Iterable[Path]:
    return (path, *path.rglob("*")) if path.is_dir() else (path,)
