"""setup.py where the extension cannot be built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
    shutil.copy(ROOT / "kron_kernels" / "__init__.py", package)
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


CUDA_FAILS = """cmake_minimum_required(VERSION 3.22)
project(tree LANGUAGES NONE)
set(record "{\\"cuda\\": \\"built\\", \\"cuda_archs\\": [\\"80\\"], \\"cuda_compiler\\": \\"13.0\\"}")
if(KRON_KERNELS_CUDA STREQUAL "OFF")
  set(record "{\\"cuda\\": \\"off\\", \\"cuda_archs\\": [], \\"cuda_compiler\\": \\"\\"}")
  add_custom_target(cpu ALL COMMAND ${CMAKE_COMMAND} -E touch "${KRON_KERNELS_OUTPUT_DIR}/_C.so")
else()
  add_custom_target(cuda ALL COMMAND ${CMAKE_COMMAND} -E false)
endif()
file(WRITE "${KRON_KERNELS_OUTPUT_DIR}/_build_info.json" "${record}")
"""


def test_kernels_that_nvcc_does_not_compile_leave_those_of_the_cpu(tree: Path) -> None:
    (tree / "CMakeLists.txt").write_text(CUDA_FAILS)
    result = build(tree, KRON_KERNELS_REQUIRE_EXT="0")
    assert result.returncode == 0, result.stderr
    reason = "not built (they did not compile: see the output of the build)"
    assert f"kron_kernels: CUDA kernels: {reason}\n" in result.stdout
    assert json.loads((tree / "kron_kernels" / "_build_info.json").read_text())["cuda"] == reason
    assert (tree / "kron_kernels" / "_C.so").is_file()
    required = build(tree, KRON_KERNELS_REQUIRE_EXT="1")
    assert required.returncode != 0
    assert "the compiled extension was not built: the C++ sources did not compile" in required.stderr


def test_architectures_come_from_the_environment(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through commas, which need no quotes in a shell."""
    monkeypatch.delenv("KRON_KERNELS_CUDA_ARCHS", raising=False)
    listing = 'list(JOIN KRON_KERNELS_CUDA_ARCHS "/" archs)\nmessage(FATAL_ERROR "asked for ${archs}.")\n'
    default = 'cmake_minimum_required(VERSION 3.22)\nset(KRON_KERNELS_CUDA_ARCHS "all" CACHE STRING "")\n'
    (tree / "CMakeLists.txt").write_text(default + listing)
    assert "asked for all." in build(tree).stderr
    assert "asked for 80+PTX/90a." in build(tree, KRON_KERNELS_CUDA_ARCHS="80+PTX,90a").stderr
    assert "asked for ." in build(tree, KRON_KERNELS_CUDA_ARCHS="").stderr


def test_binding_uses_the_stable_abi_alone() -> None:
    """No C++ symbol of at::, c10:: or torch::jit:: in it: what makes one binary good for every later torch."""
    library = ROOT / "kron_kernels" / "_C.so"
    if not library.is_file():
        pytest.skip("the compiled extension was not built in the source tree")
    symbols = library.read_bytes()
    for namespace in (b"_ZN2at", b"_ZNK2at", b"_ZN3c10", b"_ZNK3c10", b"_ZN5torch3jit"):
        assert namespace not in symbols
