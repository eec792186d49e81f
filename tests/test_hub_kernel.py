"""The layout of a kernel repository for Hugging Face's `kernels`, and what its loader makes of it."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "hub_kernel.py"
ID = "_kron_kernels_cpu_0123abc"

if not SCRIPT.is_file():
    pytest.skip("the tests run outside the source tree", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("hub_kernel", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
hub_kernel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_kernel)


@pytest.fixture(scope="module")
def modules() -> list[Path]:
    return hub_kernel.package_modules()


@pytest.fixture(scope="module")
def repository(modules: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose binary is a stand-in that does not load: the reference computes."""
    built = tmp_path_factory.mktemp("built")
    (built / "_C.so").write_bytes(b"no library")
    (built / "_build_info.json").write_text("{}")
    out = tmp_path_factory.mktemp("repository")
    hub_kernel.lay_out(out, ID, modules, built, {"sha": "0123abc", "dirty": False})
    return out


def variant(repository: Path) -> Path:
    (folder,) = (repository / "build").iterdir()
    return folder


def test_only_what_the_import_needs_is_laid_out(repository: Path) -> None:
    files = {path.relative_to(variant(repository)).as_posix() for path in variant(repository).rglob("*.py")}
    assert {"__init__.py", "_ops.py", "functional.py", "reference.py"} <= files
    assert not any(name.startswith(("models/", "cli/", "integrations/")) for name in files)


def test_modules_import_torch_the_standard_library_and_each_other(repository: Path) -> None:
    for path in variant(repository).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path.name} imports {name}"


def test_ops_are_registered_under_the_id_of_the_kernel(repository: Path) -> None:
    for path in variant(repository).rglob("*.py"):
        source = path.read_text()
        assert "kron_kernels::" not in source.replace(f"{ID}::", "")
        assert "torch.ops.kron_kernels" not in source
    assert f'"{ID}::kron_mm"' in (variant(repository) / "_ops.py").read_text()


def test_metadata_name_the_kernel_and_hold_a_digest_of_every_file(repository: Path) -> None:
    folder = variant(repository)
    assert folder.name.startswith("torch-stable-abi211-cpu-")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert (metadata["name"], metadata["id"], metadata["backend"]) == ("kron-kernels", ID, {"type": "cpu"})
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"metadata.json"}
    assert set(metadata["digest"]["files"]) == files
    expected = hashlib.sha256((folder / "_ops.py").read_bytes()).digest()
    assert base64.b64decode(metadata["digest"]["files"]["_ops.py"]) == expected


LOAD = """
import pathlib, sys, torch, kernels, kron_kernels
module = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
x, a, b = torch.randn(9, 35), torch.randn(4, 5), torch.randn(3, 7)
torch.testing.assert_close(module.kron_matmul(x, a, b), x @ torch.kron(a, b).T)
torch.testing.assert_close(kron_kernels.kron_matmul(x, a, b), x @ torch.kron(a, b).T)
print(module.kron_matmul.__module__, module.available_backends()["cpu"].available)
"""


def load(repository: Path) -> str:
    """Where ``kernels.get_local_kernel`` puts the op, in a fresh process beside the installed package."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed", minversion="0.17")
    done = subprocess.run([sys.executable, "-c", LOAD, str(repository)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_loads_it_beside_the_installed_package(repository: Path) -> None:
    assert load(repository) == f"{ID}.functional False"


def test_kernels_loads_the_compiled_one() -> None:
    built = ROOT / "build" / "hub-kernel"
    if not built.is_dir():
        pytest.skip("make hub-kernel has not been run")
    assert load(built).endswith(".functional True")
