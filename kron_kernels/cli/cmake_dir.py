"""``kron-kernels cmake-dir``: where CMake finds the C++ core of the installed package."""

from __future__ import annotations

import argparse
from typing import Any

from .cpp_core import cmake_dir
from .output import add_json_flag, print_json


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
