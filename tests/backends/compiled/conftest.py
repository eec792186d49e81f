"""The Triton kernels as the compiler leaves them, which needs no GPU. ``tests/test_compiled.py`` runs them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Under Triton's interpreter nothing can be compiled, and one process cannot do both.
if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") != "0":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
