"""``kron-kernels cmake-dir``: print where CMake finds the C++ core of the installed package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..backends import build_info
from .output import add_json_flag, print_json

_PACKAGE = Path(__file__).resolve().parent.parent


def cmake_dir() -> Path:
    """Return the folder to give to CMake as ``kron_kernels_DIR``: headers and library, for projects without torch.

    Raises RuntimeError where the package was installed without its compiled part.
    """
    folder = _PACKAGE / "share/cmake/kron_kernels"
    if not (folder / "kron_kernelsConfig.cmake").is_file():
        reason = build_info().get("missing", "the package was not built")
        raise RuntimeError(f"{folder} is absent: {reason}")
    return folder


def add_parser(commands: Any) -> None:
    """Add the ``cmake-dir`` command."""
    parser = commands.add_parser(
        "cmake-dir",
        help="print the folder of the CMake package of the C++ core",
        description="Print the folder to give to CMake as kron_kernels_DIR, so that find_package(kron_kernels) finds "
        "the headers and the library of this package.",
    )
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the folder."""
    folder = str(cmake_dir())
    if arguments.json:
        print_json({"cmake_dir": folder})
    else:
        print(folder)
    return 0
