"""The C++ core without torch: its CMake package, its version, and the example that uses both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from kron_kernels import __version__, backends
from kron_kernels.cli import cmake_dir, main

ROOT = Path(__file__).resolve().parents[2]
HAS_CPU = backends.available()["cpu"]

needs_extension = pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)


@pytest.fixture(scope="module")
def cmake() -> list[str]:
    """The start of a configuring command; skips where there is no CMake or no C++ compiler."""
    try:
        import cmake

        program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        program = shutil.which("cmake") or ""
    if not program:
        pytest.skip("cmake is not installed")
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler is installed")
    return [program]


def configure(cmake: list[str], source: Path, build: Path, package: Path) -> subprocess.CompletedProcess[str]:
    command = [*cmake, "-S", str(source), "-B", str(build), f"-Dkron_kernels_DIR={package}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@needs_extension
def test_the_example_finds_the_installed_package_and_computes_right(cmake: list[str], tmp_path: Path) -> None:
    done = configure(cmake, ROOT / "examples" / "cpp", tmp_path, cmake_dir.cmake_dir())
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*cmake, "--build", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([tmp_path / "kron_matmul"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # The macros of the headers and the functions of the library, by way of the example's own line.
    assert done.stdout.startswith(f"kron_kernels {__version__}, headers {__version__}, ")


@needs_extension
@pytest.mark.parametrize("wanted", ["0.1", "0.2", "1.0"])
def test_a_project_gets_only_a_version_of_the_same_abi(cmake: list[str], wanted: str, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(asks LANGUAGES NONE)\n"
        f"find_package(kron_kernels {wanted} REQUIRED)\n"
    )
    done = configure(cmake, tmp_path, tmp_path / "build", cmake_dir.cmake_dir())
    fits = __version__.split(".")[:2] == wanted.split(".")
    assert (done.returncode == 0) == fits, done.stderr
    if not fits:
        assert f"version: {__version__}" in done.stderr


@needs_extension
def test_the_library_is_named_by_its_abi() -> None:
    major, minor, _ = __version__.split(".")
    abi = f"{major}.{minor}" if major == "0" else major
    library = cmake_dir._PACKAGE / f"libkron_core.so.{abi}"
    assert library.is_file()
    # Its SONAME, which the binding asks the loader for.
    assert library.name.encode() in (cmake_dir._PACKAGE / "_C.so").read_bytes()


@needs_extension
def test_cmake_dir_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cmake-dir"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "kron_kernelsConfig.cmake").is_file()


def test_a_package_without_its_compiled_part_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cmake_dir, "_PACKAGE", tmp_path)
    monkeypatch.setattr(cmake_dir, "build_info", lambda: {"missing": "no compiler"})
    with pytest.raises(RuntimeError, match="is absent: no compiler"):
        cmake_dir.cmake_dir()
    assert main(["cmake-dir"]) == 2
    assert "is absent: no compiler" in capsys.readouterr().err


def test_a_source_distribution_holds_all_that_is_compiled(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kron_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "sdist"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"CMakeLists.txt", "setup.py", "kron_kernels/integrations/krona.py"} <= held
