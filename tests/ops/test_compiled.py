"""Runs ``tests/compiled`` in a process of its own: in this one, without a GPU, Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

_TESTS = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "0", reason="tests/compiled runs in this process")
@pytest.mark.parametrize("file", sorted(path.name for path in (_TESTS / "compiled").glob("test_*.py")))
def test_compiled(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_TESTS / "compiled" / file)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, cwd=_TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
