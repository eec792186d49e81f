"""The CUDA binding and kernels for tensors of the CPU, under the emulator: built once with CMake and a C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated-binding"


def emulated_ops() -> Any:
    """The namespace of the emulated ops; skips where they cannot be built."""
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("the tests run outside the source tree")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not cmake or not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("the emulated CUDA kernels need cmake and a C++ compiler")
    options = {
        "KRON_KERNELS_BUILD_TESTS": "ON",
        "KRON_KERNELS_CUDA": "OFF",
        "KRON_KERNELS_TORCH_DIR": str(Path(torch.__file__).parent),
        "Python_EXECUTABLE": sys.executable,
    }
    _run(cmake, "-S", str(ROOT), "-B", str(BUILD), *(f"-D{name}={value}" for name, value in options.items()))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    _run(cmake, "--build", str(BUILD), "--target", "_C_cuda_emulated", "--parallel", jobs)
    torch.ops.load_library(BUILD / "kron_kernels" / "_C_cuda_emulated.so")
    return torch.ops.kron_kernels_cuda_emulated


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
