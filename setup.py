"""Builds the compiled extension with CMake and ninja; everything else about the package is in pyproject.toml.

Environment: MAX_JOBS limits parallel compilation; KRON_KERNELS_REQUIRE_EXT=1 makes a failed build of the extension an
error instead of a pure Python install; KRON_KERNELS_CUDA_ARCHS names the GPU architectures of the CUDA kernels
("80+PTX,90a"; empty: none; unset: those of the GPUs that are there); KRON_KERNELS_CMAKE_ARGS adds arguments to CMake's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILT = ("_C.so", "_C_cuda.so", "libkron_core.so*", "libkron_cuda.so*", "_introspect*.so", "_build_info.json")
# For C++ projects that use the core: headers, and what find_package(kron_kernels) reads.
BUILT_FOLDERS = ("include", "share")


class BuildError(Exception):
    """Why the extension cannot be built here."""


def find_tool(name: str) -> list[str]:
    """The command of a build tool: the one of this Python's environment, else of PATH; [] when there is none."""
    if importlib.util.find_spec(name):
        return [sys.executable, "-m", name]
    path = shutil.which(name)
    return [path] if path else []


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def configure_arguments(output: Path) -> list[str]:
    torch = package_folder("torch")
    if torch is None:
        raise BuildError("torch is not installed in the build environment")
    cuda_archs = os.environ.get("KRON_KERNELS_CUDA_ARCHS")
    arguments = [
        f"-DKRON_KERNELS_OUTPUT_DIR={output}",
        f"-DKRON_KERNELS_TORCH_DIR={torch}",
        f"-DPython_EXECUTABLE={sys.executable}",
        # Inside the package the library lies at the top.
        "-DCMAKE_INSTALL_LIBDIR=.",
        *([f"-DKRON_KERNELS_CUDA_ARCHS={cuda_archs.replace(',', ';')}"] if cuda_archs is not None else []),
        *shlex.split(os.environ.get("KRON_KERNELS_CMAKE_ARGS", "")),
    ]
    pybind11 = package_folder("pybind11")
    if pybind11:
        arguments += [f"-Dpybind11_DIR={pybind11 / 'share/cmake/pybind11'}", "-DPYBIND11_FINDPYTHON=ON"]
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if ninja:
        arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return arguments


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries, into the build folder, or into the source tree for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        output = (ROOT if in_place else Path(self.build_lib).resolve()) / "kron_kernels"
        output.mkdir(parents=True, exist_ok=True)
        for pattern in BUILT:
            for stale in output.glob(pattern):
                stale.unlink()
        for folder in BUILT_FOLDERS:
            shutil.rmtree(output / folder, ignore_errors=True)
        try:
            self.build_libraries(output)
        except (BuildError, OSError) as error:
            reason = str(error)
            if os.environ.get("KRON_KERNELS_REQUIRE_EXT") == "1":
                raise SystemExit(f"kron_kernels: the compiled extension was not built: {reason}") from error
            print(
                f"kron_kernels: the compiled extension was NOT built: {reason}\n"
                "kron_kernels: installing the pure Python package, which computes through plain torch",
                file=sys.stderr,
            )
            for pattern in BUILT:
                for partial in output.glob(pattern):
                    partial.unlink()
            (output / "_build_info.json").write_text(json.dumps({"missing": reason}, indent=2) + "\n")

    def build_libraries(self, output: Path) -> None:
        cmake = find_tool("cmake")
        if not cmake:
            raise BuildError("cmake not found")
        build = Path(self.build_temp).resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # Isolated builds come with new paths every time: keep the objects, not the cache.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [*cmake, "-S", str(ROOT), "-B", str(build), *configure_arguments(output)]
        compile_all = [*cmake, "--build", str(build), "--parallel", jobs]
        if subprocess.run(configure, check=False).returncode:
            raise BuildError(
                "CMake could not configure the build: is a C++17 compiler (GCC 11, Clang 12 or newer) installed?"
            )
        record = output / "_build_info.json"
        failed = subprocess.run(compile_all, check=False).returncode != 0
        with_cuda = json.loads(record.read_text())["cuda_archs"]
        if failed and with_cuda and os.environ.get("KRON_KERNELS_REQUIRE_EXT") != "1":
            # What nvcc makes of the GPU's kernels must not cost the CPU's.
            print("kron_kernels: trying once more without the CUDA kernels", file=sys.stderr)
            for partial in output.glob("*_cuda.so*"):
                partial.unlink()
            subprocess.run([*configure, "-DKRON_KERNELS_CUDA=OFF"], check=False)
            failed = subprocess.run(compile_all, check=False).returncode != 0
            reason = {"cuda": "not built (they did not compile: see the output of the build)"}
            record.write_text(json.dumps({**json.loads(record.read_text()), **reason}, indent=2) + "\n")
        if failed:
            raise BuildError("the C++ sources did not compile: see the output of the build")
        install = [*cmake, "--install", str(build), "--prefix", str(output), "--component", "development"]
        if subprocess.run(install, check=False).returncode:
            raise BuildError("CMake could not install the headers: see the output of the build")
        info = json.loads(record.read_text())
        archs = f" for {' '.join(info['cuda_archs'])} with nvcc {info['cuda_compiler']}" if info["cuda_archs"] else ""
        print(f"kron_kernels: CUDA kernels: {info['cuda']}{archs}")

    def get_outputs(self) -> list[str]:
        patterns = (*BUILT, *(f"{folder}/**/*.*" for folder in BUILT_FOLDERS))
        return [str(path) for pattern in patterns for path in (Path(self.build_lib) / "kron_kernels").glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("kron_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
