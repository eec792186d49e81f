"""Parse arguments, run a command, and turn an error into one line on stderr and an exit code.

Exit codes: 0 done; 1 a check failed; 2 the request was wrong or could not be carried out; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any, NoReturn

from safetensors import SafetensorError

from .. import __version__
from . import bench, cmake_dir, compress, distill, env, evaluate, explain, export, report

# Each command and an example of its use, in the order in which a model goes through them.
COMMANDS: dict[str, tuple[Any, str]] = {
    "env": (env, "kron-kernels env"),
    "explain": (explain, "kron-kernels explain 384x384,2x2 --tokens 1024"),
    "compress": (compress, "kron-kernels compress path/to/bert small --preset K8 --calibrate sentences.txt"),
    "distill": (distill, "kron-kernels distill task --teacher bert --student small --task sst2 --data sst2 --out run"),
    "evaluate": (evaluate, "kron-kernels evaluate run/model --task sst2 --data sst2"),
    "report": (report, "kron-kernels report run --out report"),
    "export": (export, "kron-kernels export small small.onnx"),
    "bench": (bench, "kron-kernels bench layers --tokens 1,128"),
    "cmake-dir": (cmake_dir, "cmake -B build -Dkron_kernels_DIR=$(kron-kernels cmake-dir)"),
}
_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, SafetensorError, UnpicklingError)


class _Parser(argparse.ArgumentParser):
    """argparse's parser with its error cut down to one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; each subcommand sets ``run``."""
    parser = _Parser(prog="kron-kernels", description="Kronecker-factored linear layers and encoders.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, example) in COMMANDS.items():
        module.add_parser(commands)
        commands.choices[name].epilog = f"example: {example}"
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; without a command, print the help."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments)
    except _ERRORS as error:
        print(f"kron-kernels {arguments.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kron-kernels {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in message:
        return f"the disk is full: {message}"
    return message
