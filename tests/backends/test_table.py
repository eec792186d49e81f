"""The table of backends: what is available and why not, and what importing the package loads."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kron_kernels
from kron_kernels import backends

PACKAGE = Path(kron_kernels.__file__).parent
HAS_CPU = backends.available()["cpu"]
needs_extension = pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)
NAMES = "'auto', 'cpu', 'triton', 'cuda', 'reference'"
LEVELS = "'portable', 'neon', 'avx2', 'avx512', 'amx'"


def run(code: str, root: Path = PACKAGE.parent, **environment: str) -> str:
    """Standard output of ``python -c code`` with the package of ``root`` first on the path."""
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=variables, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the package as a tree without compiler has it: no compiled files."""
    ignored = shutil.ignore_patterns("*.so", "*.so.*", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "kron_kernels", ignore=ignored)
    return tmp_path


@pytest.mark.slow
def test_import_is_lean() -> None:
    heavy = "{'transformers', 'triton', 'matplotlib', 'safetensors', 'pybind11'}"
    code = (
        f"import torch, sys; before = set(sys.modules); import kron_kernels; print({heavy} & set(sys.modules) - before)"
    )
    assert run(code) == "set()"


@pytest.mark.slow
def test_package_without_compiled_libraries(bare: Path) -> None:
    code = """
import torch, kron_kernels
from kron_kernels.backends import cuda
x, a, b = torch.randn(3, 10, requires_grad=True), torch.randn(2, 4, 5), torch.randn(2, 3, 2)
kron_kernels.kron_matmul(x, a, b, activation="gelu").sum().backward()
torch.ops.kron_kernels.kron_matmul(x.detach(), a, b, None, 0)
actions = (
    lambda: kron_kernels.kron_matmul(x, a, b, backend="cpu"), kron_kernels.backends.cpu_isa,
    lambda: kron_kernels.kron_matmul(x, a, b, backend="cuda"), lambda: cuda.kron_matmul(x, a, b, None, 0),
)
for action in actions:
    try:
        action()
    except RuntimeError as error:
        print(error)
"""
    cpu = "backend 'cpu' is not available: the compiled extension is absent: the package was not built"
    cuda = "backend 'cuda' is not available: the CUDA kernels are absent: the package was not built"
    assert run(code, bare).splitlines() == [cpu, cpu, cuda, cuda]


@pytest.mark.slow
def test_reasons_of_failed_builds_and_damaged_libraries(bare: Path) -> None:
    code = "import kron_kernels\nfor n in ('cpu', 'cuda'): print(kron_kernels.available_backends()[n].reason)"
    (bare / "kron_kernels" / "_build_info.json").write_text('{"missing": "no compiler"}')
    assert run(code, bare).splitlines() == [
        "the compiled extension is absent: no compiler",
        "the CUDA kernels are absent: no compiler",
    ]
    for name in ("_C.so", "_C_cuda.so"):
        (bare / "kron_kernels" / name).write_bytes(b"not a library")
    cpu, cuda = run(code, bare).splitlines()
    assert cpu.startswith("the compiled extension does not load: ")
    assert cuda.startswith("the CUDA kernels do not load: ")


@pytest.mark.slow
def test_environment_chooses_the_backend() -> None:
    code = """
try:
    from kron_kernels import backends
    print(backends.resolve(None, "cpu"))
except ValueError as error:
    print(error)
"""
    assert run(code, KRON_KERNELS_BACKEND="reference", KRON_KERNELS_CPU_ISA="") == "reference"
    fast = f"environment variable KRON_KERNELS_BACKEND: expected one of {NAMES}, got 'fast'"
    assert run(code, KRON_KERNELS_BACKEND="fast") == fast
    sse = f"environment variable KRON_KERNELS_CPU_ISA: expected one of {LEVELS}, got 'sse'"
    assert run(code, KRON_KERNELS_CPU_ISA="sse") == sse
    if HAS_CPU.available:
        code = "from kron_kernels import backends; print(backends.cpu_isa())"
        assert run(code, KRON_KERNELS_CPU_ISA="portable") == "portable"


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.resolve("auto", "cpu") == ("cpu" if HAS_CPU.available else "reference")
    assert backends.resolve("auto", "meta") == "reference"
    assert backends.resolve("reference", "cpu") == "reference"
    with pytest.raises(ValueError, match=f"backend: expected one of {NAMES}, got ''"):
        backends.resolve("", "cpu")
    status = backends.Status("cpu", False, "no compiler")
    monkeypatch.setitem(backends.BACKENDS, "cpu", dataclasses.replace(backends.BACKENDS["cpu"], status=lambda: status))
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: no compiler"):
        backends.resolve("cpu", "cpu")
    assert backends.resolve("auto", "cpu") == "reference"


@needs_extension
def test_isa_cap() -> None:
    top = backends.set_cpu_isa("amx")
    compiled = backends.introspect().compiled_isas()
    for level in backends.CPU_ISA_LEVELS[: backends.CPU_ISA_LEVELS.index(top) + 1]:
        expected = level if level in compiled else "portable"  # of another processor family
        assert backends.set_cpu_isa(level) == expected == backends.cpu_isa()
    assert backends.set_cpu_isa("amx") == top
    with pytest.raises(ValueError, match=f"cap: expected one of {LEVELS}, got 'sse'"):
        backends.set_cpu_isa("sse")
