"""Argument parsing and the one place where an error becomes a line on stderr and an exit code.

Exit codes: 0 done; 1 a check failed; 2 the request was wrong or could not be carried out; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from . import (
    bench,
    cmake_dir,
    compress,
    distill,
    env,
    evaluate,
    explain,
    export,
    report,
)

# In the order of a model's way.
_COMMANDS: dict[str, Any] = {
    "env": env,
    "explain": explain,
    "compress": compress,
    "distill": distill,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "bench": bench,
    "cmake-dir": cmake_dir,
}


class _Parser(argparse.ArgumentParser):
    """argparse's parser with its error cut down to one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each subcommand sets ``run``."""
    parser = _Parser(prog="kron-kernels", description="Kronecker-factored linear layers and encoders.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(_COMMANDS)}}}")
    for module in _COMMANDS.values():
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"kron-kernels {arguments.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kron-kernels {arguments.command}: interrupted", file=sys.stderr)
        return 130
