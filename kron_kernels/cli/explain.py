"""``kron-kernels explain``: show which backend computes a product, and why."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

import torch

from ..backends import select
from ..backends.explain import explain
from .output import add_json_flag, print_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_parser(commands: Any) -> None:
    """Add the ``explain`` command."""
    parser = commands.add_parser(
        "explain",
        help="show which backend computes a product, and why",
        description="Show which backend computes an op on factors of given sizes on this machine, why, and the form of "
        "its kernels. On a machine without a GPU, --device cuda or --backend shows the GPU backends too.",
    )
    parser.add_argument(
        "products",
        nargs="+",
        metavar="M1xN1,M2xN2[,S]",
        help="factors of a product, such as 384x384,2x2, and their terms; of a feed-forward block both products",
    )
    parser.add_argument(
        "--op", default="kron_matmul", help="such as kron_matmul, kron_matmul_backward, kron_ffn, kron_qkv"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    parser.add_argument("--backend", help="the backend that a call names")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation; GPU backends are left out where nothing refers to a GPU."""
    explanation = explain(
        *map(_sizes, arguments.products),
        op=arguments.op,
        dtype=_DTYPES[arguments.dtype],
        tokens=arguments.tokens,
        device=arguments.device,
        backend=arguments.backend,
    )
    if not (torch.cuda.is_available() or arguments.device == "cuda" or arguments.backend in select.NAMES):
        forms = {name: form for name, form in explanation.forms.items() if name not in select.NAMES}
        explanation = dataclasses.replace(explanation, forms=forms)
    if arguments.json:
        print_json(dataclasses.asdict(explanation))
    else:
        print(explanation)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d+)x(\d+),(\d+)x(\d+)(?:,(\d+))?", text)
    if match is None:
        raise ValueError(f"products: expected sizes such as 384x384,2x2 or 384x384,2x2,4 for four terms, got {text!r}")
    *sizes, terms = match.groups(default="1")
    return (int(terms), *map(int, sizes))
