"""Why the compiled CUDA kernels do not run: each reason, on machines with and without nvcc, driver and GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kron_kernels
from kron_kernels import backends

PACKAGE = Path(kron_kernels.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
BUILT = (PACKAGE / "_C_cuda.so").is_file()
needs_kernels = pytest.mark.skipif(not BUILT, reason=f"CUDA kernels: {backends.build_info().get('cuda', 'not built')}")
needs_no_driver = pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="an NVIDIA driver is installed")
STATUS = "from kron_kernels.backends import cuda; s = cuda.status(); print(s.available, s.reason, sep='|')"
DEVICE = "from kron_kernels.backends import cuda; print(*cuda.device_status(), sep='|')"

# A driver that serves a version of CUDA and answers the first call: all that the CUDA runtime asks before it gives up.
DRIVER = """
#include <string.h>
int cuDriverGetVersion(int* version) { return *version = VERSION, 0; }
int cuInit(unsigned flags) { return INIT; }
#if VERSION >= 13000
static int nothing(void) { return 0; }
int cuGetProcAddress_v2(const char* name, void** f, int version, unsigned long flags, int* found) {
    *f = !strcmp(name, "cuInit") ? (void*)cuInit : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
       : !strcmp(name, "cuGetProcAddress") ? (void*)cuGetProcAddress_v2 : (void*)nothing;
    return 0;
}
#endif
"""


def run(code: str, root: Path = PACKAGE.parent, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def driver(folder: Path, version: int, init: int) -> dict[str, str]:
    """Environment in which that driver is found."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler is installed")
    source = folder / "driver.c"
    source.write_text(DRIVER)
    macros = (f"-DVERSION={version}", f"-DINIT={init}")
    subprocess.run([compiler, "-shared", "-fPIC", *macros, source, "-o", folder / "libcuda.so.1"], check=True)
    return {"LD_LIBRARY_PATH": str(folder)}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "the package was not built"),
        ('{"cuda": "not built (nvcc absent)"}', "not built (nvcc absent)"),
        ('{"missing": "no compiler"}', "no compiler"),
    ],
)
def test_kernels_that_were_not_built(record: str | None, reason: str, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "*.so.*", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "kron_kernels", ignore=ignored)
    if record:
        (tmp_path / "kron_kernels" / "_build_info.json").write_text(record)
    assert run(STATUS, tmp_path) == f"False|the CUDA kernels are absent: {reason}"
    call = "import torch; from kron_kernels.backends import cuda\n"
    call += "try: cuda.kron_matmul(*[torch.ones(1, 1)] * 3, None, 0)\n"
    call += "except RuntimeError as error: print(error)\n"
    call += "print(cuda._kernel_reason('kron_matmul', [(1,) * 5], torch.float32, 1, 80))"
    absent = f"the CUDA kernels are absent: {reason}"
    assert run(call, tmp_path).splitlines() == [f"backend 'cuda' is not available: {absent}", absent]


def test_damaged_library(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "*.so.*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "kron_kernels", ignore=ignored)
    (tmp_path / "kron_kernels" / "_C_cuda.so").write_bytes(b"not a library")
    assert run(STATUS, tmp_path).startswith("False|the CUDA kernels do not load: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("CUDA_ARCHS=75", "KRON_KERNELS_CUDA_ARCHS: expected a list of 80, 80+PTX, 90a or later ones, got 75"),
        ("CUDA_ARCHS=80,sm_90", "KRON_KERNELS_CUDA_ARCHS: expected a list of 80, 80+PTX, 90a or later ones, got sm_90"),
        ("CUDA=yes", "KRON_KERNELS_CUDA: expected AUTO, ON or OFF, got yes"),
        ("CUDA=OFF", "CUDA kernels: not built (switched off by KRON_KERNELS_CUDA)"),
        ("CUDA_ARCHS=", "CUDA kernels: not built (KRON_KERNELS_CUDA_ARCHS is empty)"),
        ("CUDA=AUTO", "CUDA kernels: not built (they come with the torch binding, unless KRON_KERNELS_CUDA is ON)"),
    ],
)
def test_options_of_the_build(option: str, message: str, tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not cmake or not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("cmake or the source tree is not there")
    options = (f"-DKRON_KERNELS_{option}", "-DKRON_KERNELS_BUILD_TORCH=OFF")
    done = subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *options], capture_output=True, text=True)
    assert message in " ".join((done.stdout + done.stderr).split())


@needs_kernels
def test_torch_without_cuda() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    assert run(STATUS) == "False|this torch was built without CUDA"


@needs_kernels
@needs_no_driver
def test_no_driver() -> None:
    assert run(DEVICE) == "False|no NVIDIA driver is installed"


@needs_kernels
@needs_no_driver
def test_driver_that_is_too_old(tmp_path: Path) -> None:
    reason = "False|the NVIDIA driver is too old: it serves CUDA 11.2, the kernels were built with CUDA "
    assert run(DEVICE, **driver(tmp_path, 11020, 0)).startswith(reason)


@needs_kernels
@needs_no_driver
def test_driver_without_a_device(tmp_path: Path) -> None:
    assert run(DEVICE, **driver(tmp_path, 99000, 100)) == "False|no CUDA device is there"
    assert run(DEVICE, **driver(tmp_path, 99000, 999)) == "False|the CUDA driver fails: unknown error"


@needs_kernels
def test_architectures() -> None:
    """Machine code serves later minor versions of its architecture, PTX all later ones, and nothing earlier ones."""
    code = (
        "import torch; from kron_kernels.backends import cuda\nfor sm in range(75, 131): print(sm, cuda._kernel_reason("
    )
    code += "'kron_matmul', [(1, 384, 384, 2, 2)], torch.bfloat16, 1, sm))"
    built = backends.build_info()["cuda_archs"]
    for line in run(code).splitlines():
        sm, answer = int(line.split()[0]), line.split(maxsplit=1)[1]
        numbers = {int(arch.rstrip("a+PTX")): "PTX" in arch for arch in built}
        runs = any(sm >= number and (ptx or sm // 10 == number // 10) for number, ptx in numbers.items())
        assert answer == ("None" if runs else f"the kernels were built for {' '.join(built)}, not for sm_{sm}")


@needs_kernels
def test_kernels_are_loaded_when_first_needed() -> None:
    code = "from kron_kernels.backends import cuda\nbefore = 'libkron_cuda' in open('/proc/self/maps').read()"
    code += "\ncuda.device_status()\nprint(before, 'libkron_cuda' in open('/proc/self/maps').read())"
    assert run(code) == "False True"


@needs_kernels
def test_the_runtime_inside_hides_its_names() -> None:
    """torch brings a CUDA runtime of its own: a call of one must not end in the other."""
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm is not installed")
    library = next(PACKAGE.glob("libkron_cuda.so*"))
    names = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    assert "kron_matmul" in names
    assert not [line for line in names.splitlines() if " cuda" in line or "__cudart" in line]
