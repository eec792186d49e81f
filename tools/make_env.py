"""Make the virtual environment that the Makefile works in: torch, the build tools, this package in editable mode.

A torch of at least 2.11 that is already there, in the environment or in the Python that starts this, is kept;
otherwise the one named by --torch is installed. Needs nothing but Python and a C++ compiler.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_TORCH = (2, 11)
BUILD_TOOLS = ("setuptools>=77", "wheel", "pybind11>=2.13", "cmake>=3.22", "ninja")
TORCH_VERSION = "import torch; print(torch.__version__)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install when no torch >= 2.11 is there")
    parser.add_argument("--extras", default="", help="optional dependencies of the package, by comma")
    parser.add_argument("--add", metavar="EXTRAS", help="only add these optional dependencies to what is installed")
    arguments = parser.parse_args()

    python = arguments.venv.absolute() / "bin" / "python"
    if arguments.add:
        step(f"adding {arguments.add}")
        # The installed package satisfies this: nothing is built again.
        pip(python, "install", f"kron_kernels[{arguments.add}]")
        return
    if not python.exists():
        shared = has_torch(Path(sys.executable))
        step(f"creating {arguments.venv}" + (" on top of this Python's torch" if shared else ""))
        venv.create(arguments.venv, with_pip=True, system_site_packages=shared)
    if not has_torch(python):
        step(f"installing {arguments.torch}")
        pip(python, "install", arguments.torch)
    step("installing the build tools")
    pip(python, "install", *BUILD_TOOLS)
    step("building and installing kron_kernels")
    # The build must find the environment's cmake and ninja first.
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    package = f"{ROOT}[{arguments.extras}]" if arguments.extras else str(ROOT)
    pip(python, "install", "--no-build-isolation", "-e", package, PATH=path)


def has_torch(python: Path) -> bool:
    """Whether this Python has a torch that is new enough."""
    found = subprocess.run([python, "-c", TORCH_VERSION], capture_output=True, text=True, cwd="/")
    if found.returncode:
        return False
    major, minor = found.stdout.strip().split(".")[:2]
    return (int(major), int(minor)) >= LEAST_TORCH


def pip(python: Path, *arguments: str, **environment: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"make_env: failed: {' '.join(command)}")


def step(text: str) -> None:
    print(f"-- {text}", flush=True)


if __name__ == "__main__":
    main()
