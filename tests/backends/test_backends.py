"""Choice of backend, its environment variables, and what is imported and when; each in a process of its own."""

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
HAS_CPU = backends.available()["cpu"]
needs_extension = pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)


def run(code: str, root: Path = PACKAGE.parent, **environment: str) -> str:
    """Standard output of ``python -c code`` with the package of ``root`` first on the path."""
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=variables, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a tree without compiler has it: no compiled files."""
    root = tmp_path_factory.mktemp("bare")
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, root / "kron_kernels", ignore=ignored)
    return root


def test_import_is_lean() -> None:
    heavy = "{'transformers', 'triton', 'matplotlib', 'safetensors', 'pybind11'}"
    code = (
        f"import torch, sys; before = set(sys.modules); import kron_kernels; print({heavy} & set(sys.modules) - before)"
    )
    assert run(code) == "set()"


def test_package_without_the_extension_computes_through_the_reference(bare: Path) -> None:
    code = f"""
import torch, kron_kernels
assert kron_kernels.__file__.startswith({str(bare)!r})
x, a, b = torch.randn(3, 10, requires_grad=True), torch.randn(2, 4, 5), torch.randn(2, 3, 2)
y = kron_kernels.kron_matmul(x, a, b, activation="gelu")
y.sum().backward()
torch.ops.kron_kernels.kron_matmul(x.detach(), a, b, None, 0)
for action in (lambda: kron_kernels.kron_matmul(x, a, b, backend="cpu"), kron_kernels.backends.cpu_isa):
    try:
        action()
    except RuntimeError as error:
        print(error)
"""
    message = "backend 'cpu' is not available: the compiled extension is absent: the package was not built"
    assert run(code, bare).splitlines() == [message, message]


def test_reason_of_a_failed_build_is_kept(bare: Path, tmp_path: Path) -> None:
    root = tmp_path / "failed"
    shutil.copytree(bare, root)
    (root / "kron_kernels" / "_build_info.json").write_text('{"missing": "no compiler"}')
    code = "import kron_kernels; print(kron_kernels.available_backends()['cpu'].reason)"
    assert run(code, root) == "the compiled extension is absent: no compiler"


def test_damaged_extension_is_no_import_error(bare: Path, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(bare, root)
    (root / "kron_kernels" / "_C.so").write_bytes(b"not a library")
    code = "import kron_kernels; print(kron_kernels.available_backends()['cpu'].reason)"
    assert run(code, root).startswith("the compiled extension does not load: ")


def test_environment_chooses_the_backend() -> None:
    code = """
from kron_kernels import backends
try:
    print(backends.resolve(None, "cpu"))
except ValueError as error:
    print(error)
"""
    assert run(code, KRON_KERNELS_BACKEND="reference") == "reference"
    expected = "expected one of 'auto', 'cpu', 'triton', 'cuda', 'reference', got 'fast'"
    assert run(code, KRON_KERNELS_BACKEND="fast") == f"environment variable KRON_KERNELS_BACKEND: {expected}"


def test_resolve() -> None:
    best = "cpu" if HAS_CPU.available else "reference"
    assert backends.resolve("auto", "cpu") == best
    assert backends.resolve("auto", "meta") == "reference"
    assert backends.resolve("reference", "cpu") == "reference"
    with pytest.raises(
        ValueError, match="backend: expected one of 'auto', 'cpu', 'triton', 'cuda', 'reference', got ''"
    ):
        backends.resolve("", "cpu")


@needs_extension
def test_isa_cap() -> None:
    top = backends.set_cpu_isa("amx")
    compiled = backends.introspect().compiled_isas()
    for level in backends.CPU_ISA_LEVELS[: backends.CPU_ISA_LEVELS.index(top) + 1]:
        expected = level if level in compiled else "portable"  # of another processor family
        assert backends.set_cpu_isa(level) == expected == backends.cpu_isa()
    assert backends.set_cpu_isa("amx") == top
    with pytest.raises(ValueError, match="cap: expected one of 'portable', 'neon', 'avx2', 'avx512', 'amx', got 'sse'"):
        backends.set_cpu_isa("sse")


@needs_extension
def test_isa_cap_from_the_environment() -> None:
    code = "from kron_kernels import backends; print(backends.cpu_isa())"
    assert run(code, KRON_KERNELS_CPU_ISA="portable") == "portable"


def test_unknown_isa_cap_in_the_environment() -> None:
    code = """
try:
    import kron_kernels
except ValueError as error:
    print(error)
"""
    expected = (
        "environment variable KRON_KERNELS_CPU_ISA: "
        "expected one of 'portable', 'neon', 'avx2', 'avx512', 'amx', got 'sse'"
    )
    assert run(code, KRON_KERNELS_CPU_ISA="sse") == expected


@needs_extension
def test_binding_and_introspection_share_one_core() -> None:
    """The scratch of an op's call is seen by the introspection module: there is one copy of the core's state."""
    from kron_kernels import _introspect

    x, a, b = torch.randn(300, 24 * 32), torch.randn(1, 32, 24), torch.randn(1, 24, 32)
    kron_kernels.kron_matmul(x[:1], a, b)
    before = _introspect.last_scratch_bytes()
    kron_kernels.kron_matmul(x, a, b)
    assert _introspect.last_scratch_bytes() != before
    assert _introspect.detected_isa() in _introspect.compiled_isas()


@needs_extension
def test_build_record() -> None:
    info = backends.build_info()
    cuda = {"cuda", "cuda_archs", "cuda_compiler"}
    assert set(info) == {"compiler", "processor", "flags", "cpu_isa", "torch", "introspection"} | cuda
    assert "portable" in info["cpu_isa"]
    assert bool(info["cuda_archs"]) == bool(info["cuda_compiler"]) == (info["cuda"] == "built")
