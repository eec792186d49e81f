"""setup.py where the extension cannot be built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the build files whose C++ does not compile at once: its CMakeLists.txt ends in an error."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run outside the source tree")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.22)\nmessage(FATAL_ERROR "no compiler")\n'
    )
    package = tmp_path / "kron_kernels"
    package.mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "kron_kernels" / name, package)
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


def test_failed_build_leaves_a_pure_python_package_that_says_why(tree: Path) -> None:
    stale = tree / "kron_kernels" / "_C.so"
    stale.write_bytes(b"of an older build")
    result = build(tree, KRON_KERNELS_REQUIRE_EXT="0")
    assert result.returncode == 0, result.stderr
    assert "the compiled extension was NOT built: CMake could not configure" in result.stderr
    assert not stale.exists()
    assert (
        "CMake could not configure" in json.loads((tree / "kron_kernels" / "_build_info.json").read_text())["missing"]
    )


def test_required_extension_makes_a_failed_build_an_error(tree: Path) -> None:
    result = build(tree, KRON_KERNELS_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "the compiled extension was not built: CMake could not configure" in result.stderr


def test_binding_uses_the_stable_abi_alone() -> None:
    """No C++ symbol of at::, c10:: or torch::jit:: in it: what makes one binary good for every later torch."""
    library = ROOT / "kron_kernels" / "_C.so"
    if not library.is_file():
        pytest.skip("the compiled extension was not built in the source tree")
    symbols = library.read_bytes()
    for namespace in (b"_ZN2at", b"_ZNK2at", b"_ZN3c10", b"_ZNK3c10", b"_ZN5torch3jit"):
        assert namespace not in symbols
