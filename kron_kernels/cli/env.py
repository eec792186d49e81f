"""``kron-kernels env``: show the machine and why each backend is on or off, and check the kernels."""

from __future__ import annotations

import argparse
import importlib.metadata
from typing import Any

import torch

from .. import backends
from ..backends import select
from ..ops import kron_matmul
from ..schemas import reference
from ..schemas.product import Product
from ..testing import describe_machine
from ..testing.problems import TOLERANCE, relative_error
from .output import add_json_flag, format_table, print_json

# One large and one tiny factor either way round, a balanced pair, and a sum of terms with odd sizes.
_CHECKS = (
    (33, 1, (48, 48), (2, 2)),
    (33, 1, (8, 2), (48, 48)),
    (33, 1, (24, 24), (32, 32)),
    (1, 1, (16, 16), (48, 48)),
    (7, 3, (5, 7), (3, 11)),
)
_OPTIONAL = ("transformers", "safetensors", "tokenizers")


def add_parser(commands: Any) -> None:
    """Add the ``env`` command."""
    parser = commands.add_parser(
        "env",
        help="show the machine and the backends, and check the kernels",
        description="Show the machine, the versions, which backends are on or off and why, and check the kernels of "
        "each against float64. "
        "Exit code 1 when a check fails.",
    )
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 when a result is wrong."""
    report = collect()
    if arguments.json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["correct"] else 1


def collect() -> dict[str, Any]:
    """Return everything that ``env`` shows, as plain data."""
    checks = check_backends()
    return {
        "machine": describe_machine(),
        "packages": {name: _version(name) for name in _OPTIONAL},
        "backends": {
            name: {"available": status.available, "reason": status.reason}
            for name, status in backends.available().items()
        },
        "build": backends.build_info(),
        "checks": checks,
        "correct": all(check["ok"] for check in checks),
    }


def check_backends() -> list[dict[str, Any]]:
    """Return the largest relative error of each available backend and dtype over a few shapes, against float64."""
    rows = []
    for name, status in backends.available().items():
        if not status.available:
            continue
        for dtype, tolerance in TOLERANCE.items():
            if name in select.NAMES and any(
                select.unsupported_reason(name, "kron_matmul", (_product(case),), dtype) for case in _CHECKS
            ):
                continue
            error = max(_error(name, dtype, *case) for case in _CHECKS)
            rows.append(
                {
                    "backend": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "error": error,
                    "tolerance": tolerance,
                    "ok": error <= tolerance,
                }
            )
    return rows


def _error(
    backend: str, dtype: torch.dtype, tokens: int, terms: int, a_shape: tuple[int, int], b_shape: tuple[int, int]
) -> float:
    generator = torch.Generator().manual_seed(0)
    m, n = a_shape[0] * b_shape[0], a_shape[1] * b_shape[1]
    shapes = ((tokens, n), (terms, *a_shape), (terms, *b_shape), (m,))
    device = backends.BACKENDS[backend].device() or "cpu"
    x, a, b, bias = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    got = kron_matmul(x, a, b, bias, backend=backend)
    error = relative_error(got, reference.kron_matmul(x.double(), a.double(), b.double(), bias.double()))
    return error if error == error else float("inf")


def _product(case: tuple[int, int, tuple[int, int], tuple[int, int]]) -> Product:
    _, terms, a_shape, b_shape = case
    return Product(terms, *a_shape, *b_shape)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(report: dict[str, Any]) -> None:
    rows = [(key, value) for key, value in report["machine"].items()]
    rows += [(name, version or "not installed") for name, version in report["packages"].items()]
    rows += [(f"build: {key}", _flat(value)) for key, value in report["build"].items()]
    print(format_table(("machine", ""), rows))
    print()
    backends = [
        (name, "on" if status["available"] else "off", status["reason"]) for name, status in report["backends"].items()
    ]
    print(format_table(("backend", "", "why"), backends))
    print()
    checks = [
        (row["backend"], row["dtype"], f"{row['error']:.1e}", f"{row['tolerance']:.0e}", "ok" if row["ok"] else "WRONG")
        for row in report["checks"]
    ]
    print(format_table(("check against float64", "dtype", "error", "tolerance", ""), checks))


def _flat(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
