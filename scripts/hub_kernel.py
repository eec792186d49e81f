"""Lay the package out as a kernel repository for Hugging Face's ``kernels``: modules, binary, metadata.

python scripts/hub_kernel.py --out build/hub-kernel [--build build/native] [--jobs 2]

Layout and metadata follow https://huggingface.co/docs/kernels/kernel-requirements. The variant is the one of torch's
stable ABI, so one build serves every torch from 2.11 on (``kernels`` 0.17 or later knows it). Several versions of a
kernel may live in one process, so the ops are registered under the kernel's own id instead of ``kron_kernels``, and the
core is linked into the binding. What was laid out is then loaded in a fresh process beside the installed package and
compared with it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "kron-kernels"
# Version 0 is for kernels whose API may still change.
VERSION = 0
LICENSE = "mit"
LEAST_TORCH = "211"  # of the stable ABI in CMakeLists.txt

# What `import kron_kernels` loads, and nothing else: it needs torch alone.
LIST_MODULES = """
import json, sys, kron_kernels
print(json.dumps([m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "kron_kernels"]))
"""

CHECK = """
import importlib.util, json, pathlib, sys
import torch
import kron_kernels
folder = pathlib.Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
status = module.available_backends()["cpu"]
assert status.available, status.reason
x, a, b = torch.randn(33, 35), torch.randn(4, 5, requires_grad=True), torch.randn(3, 7)
theirs, mine = (m.kron_matmul(x, a, b, activation="gelu") for m in (kron_kernels, module))
torch.testing.assert_close(mine, theirs)
for one, other in zip(torch.autograd.grad(mine.sum(), a), torch.autograd.grad(theirs.sum(), a), strict=True):
    torch.testing.assert_close(one, other)
assert hasattr(torch.ops, name) and module.functional.kron_mm is not kron_kernels.functional.kron_mm
print(f"checked: {folder}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub-kernel", help="folder of the repository")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "native", help="build folder of CMake")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel compilations")
    arguments = parser.parse_args()
    commit, dirty = source_state()
    kernel_id = f"_kron_kernels_cpu_{commit[:7]}" + ("_dirty" if dirty else "")
    built = compile_binding(arguments.build, kernel_id, arguments.jobs)
    folder = lay_out(arguments.out, kernel_id, package_modules(), built, {"sha": commit, "dirty": dirty})
    shutil.copy(ROOT / "LICENSE", arguments.out)
    run([sys.executable, "-c", CHECK, str(folder)])


def variant() -> str:
    """Name of the build variant of this machine."""
    return f"torch-stable-abi{LEAST_TORCH}-cpu-{platform.machine()}-{platform.system().lower()}"


def source_state() -> tuple[str, bool]:
    """Commit of the source tree, and whether tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True, text=True).stdout
    return commit, bool(changes.strip())


def compile_binding(build: Path, kernel_id: str, jobs: int) -> Path:
    """Build ``_C.so`` with its ops under ``kernel_id`` and the core inside; returns the folder that holds it."""
    output = build.resolve() / kernel_id
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DKRON_KERNELS_BUILD_TORCH=ON"]
    if not (build / "CMakeCache.txt").exists() and shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    options = {
        "STATIC_CORE": "ON",
        "CUDA": "OFF",  # the variant is the CPU's
        "OPS_NAMESPACE": kernel_id,
        "OUTPUT_DIR": str(output),
    }
    configure += [f"-DKRON_KERNELS_{name}={value}" for name, value in options.items()]
    run([*configure, f"-DPython_EXECUTABLE={sys.executable}"])
    run(["cmake", "--build", str(build), "--target", "_C", "--parallel", str(jobs)])
    return output


def package_modules() -> list[Path]:
    """Python files of the package that its import loads."""
    done = subprocess.run([sys.executable, "-c", LIST_MODULES], check=True, capture_output=True, text=True, cwd=ROOT)
    return [Path(file) for file in json.loads(done.stdout) if file.endswith(".py")]


def lay_out(out: Path, kernel_id: str, modules: Iterable[Path], built: Path, source: dict[str, str | bool]) -> Path:
    """Write ``out/build/VARIANT`` anew from Python files of the package and the folder of ``_C.so``; returns it."""
    folder = out / "build" / variant()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    package = ROOT / "kron_kernels"
    for module in modules:
        target = folder / module.resolve().relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename_ops(module.read_text(encoding="utf-8"), kernel_id), encoding="utf-8")
    for name in ("_C.so", "_build_info.json"):
        shutil.copy(built / name, folder)
    metadata = {
        "name": NAME,
        "id": kernel_id,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "build-info": {"kernel": source},
        "digest": {"algorithm": "sha256", "files": digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def rename_ops(source: str, kernel_id: str) -> str:
    """``source`` with the ops' namespace exchanged: ``kron_kernels::op`` and ``torch.ops.kron_kernels.op``."""
    return re.sub(r"(?<=torch\.ops\.)kron_kernels\b|\bkron_kernels(?=::)", kernel_id, source)


def digests(folder: Path) -> dict[str, str]:
    """Base64 of the SHA-256 of each file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def run(command: list[str]) -> None:
    """Run a command of the build from the source tree; exits with its name where it fails."""
    print("--", " ".join(command[:3]).splitlines()[0], "...", flush=True)
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"hub_kernel: failed: {command[0]} (its messages are above)")


if __name__ == "__main__":
    main()
