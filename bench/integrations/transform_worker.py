"""The child process of bench.integrations.transform: every way to one point, checked against float64, then in turns.

Reads the point as JSON from its argument and writes a row for each way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.protocol import Say, protocol
from kron_kernels import kron_matmul, kron_matmul_int8, reference
from kron_kernels.cli.bench import DTYPES
from kron_kernels.timing import Variant, interleave
from kron_kernels.timing.compare import first_line
from kron_kernels.timing.problem import random_normal, relative_error

Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Of q * scale: the 255 steps of a token of normal values leave 0.9 %, bfloat16's products another percent at most.
TOLERANCE = 2e-2
BASELINE = "matmul, torch quantisation"


def quantise(y: Tensor) -> tuple[Tensor, Tensor]:
    """Per token and symmetric by torch's own operations, in the dtype of ``y (T, m)``."""
    scale = (y.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(y.dtype).tiny)
    return (y / scale).round().clamp(-127, 127).to(torch.int8), scale


def stock(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two matmuls, as FlatQuant's fallback without its GPU kernel has them."""
    grid = x.view(-1, a.shape[1], b.shape[1])
    return quantise((a @ (grid @ b.mT)).view(len(x), -1))


WAYS: dict[str, Callable[[], Way]] = {
    BASELINE: lambda: stock,
    "the same, compiled": lambda: torch.compile(stock, fullgraph=True, dynamic=False),
    "kron_matmul, torch quantisation": lambda: lambda x, a, b: quantise(kron_matmul(x, a, b)),
    "kron_matmul_int8": lambda: kron_matmul_int8,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    time_ways(job, say)


def time_ways(job: dict[str, Any], say: Say) -> None:
    """A row of each way to the job's point."""
    left, right = job["left"], job["right"]
    normal = random_normal(DTYPES[job["dtype"]])
    x = normal(job["tokens"], left * right)
    a, b = normal(left, left, scale=left**-0.5), normal(right, right, scale=right**-0.5)
    exact = reference.kron_mm(x.double(), a[None].double(), b[None].double())
    rows, variants = [], []
    for name, make in WAYS.items():
        if job.get("compile", True) or "compiled" not in name:
            row, run = checked(name, make, (x, a, b), exact)
            rows.append(row)
            variants += [Variant(name, run)] if run else []
    timings = {}
    if any(variant.name == BASELINE for variant in variants):
        timings = {timing.name: timing for timing in interleave(variants, BASELINE, seconds=job["seconds"])}
    for row in rows:
        timing = timings.get(row["way"])
        say({**row, **(timing.columns("us") if timing else {})})


def checked(
    name: str, make: Callable[[], Way], operands: tuple[Tensor, Tensor, Tensor], exact: Tensor
) -> tuple[dict[str, Any], Callable[[], object] | None]:
    """The row of a way without its times, and what runs it once: None where it fails or is wrong."""
    try:
        way = make()
        with torch.inference_mode():
            q, scale = way(*operands)
    except Exception as failure:  # a compiler may raise anything, and must not end the run
        return {"way": name, "status": "failed", "reason": first_line(failure)}, None
    error = relative_error(q.double() * scale.double(), exact)
    row: dict[str, Any] = {"way": name, "status": "ok", "error": error}
    if not error <= TOLERANCE:
        return {**row, "status": "wrong", "reason": f"relative error above {TOLERANCE:.0e}"}, None

    def run() -> object:
        with torch.inference_mode():
            return way(*operands)

    return row, run


if __name__ == "__main__":
    main()
