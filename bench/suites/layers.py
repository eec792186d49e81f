"""Single layers of BERT-base: dense, stock products with the factors, peers and this package."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from bench.baselines import op_candidate
from bench.suites import Point
from kron_kernels.testing.machine import square_product
from kron_kernels.testing.memory import peak_memory_growth
from kron_kernels.testing.problems import CASES, FFN_CASES, QKV_CASES, Candidate, OpProblem
from kron_kernels.testing.timing import Timing, Variant

SECONDS = 0.3
COLUMNS = ("factors", "saving", "peak_share")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, BACKWARD_TOKENS = (1, 32, 128, 1024, 4096), (128, 1024, 4096)
COLD_COPIES = 12
OURS = ("kron_kernels", "kron_kernels, inference form")
ALL_CASES = {**CASES, **FFN_CASES, **QKV_CASES}
ALONE = ("dense", "dense, packed", "torch.kron + linear", "matmul", "LyCORIS", *OURS)
# FastKron runs in a process of its own: merely loading it changes how torch's threads behave.
FASTKRON = ("dense", "FastKron", "kron_kernels")


def points(quick: bool) -> list[Point]:
    """Hot weights first; cold ones forward only."""
    if quick:
        return op_points(["balanced"], ["fp32"], (3,), (3,))
    return op_points(list(CASES), list(DTYPES), TOKENS, BACKWARD_TOKENS)


def op_points(cases: list[str], dtypes: list[str], forward: tuple[int, ...], backward: tuple[int, ...]) -> list[Point]:
    """Return the points of these cases: forward, forward and backward, then forward with cold weights."""
    kinds = (("forward", "hot", forward), ("forward+backward", "hot", backward), ("forward", "cold", forward))
    return [
        Point(case, direction, dtype, str(count), weights)
        for (direction, weights, tokens), dtype, case in itertools.product(kinds, dtypes, cases)
        for count in tokens
    ]


def groups(point: Point) -> list[tuple[str, ...]]:
    # Compiling takes longer than all the timing: cold weights do without.
    more = ("matmul, compiled",) if point.weights == "hot" else ()
    fastkron = [FASTKRON] if (point.direction, point.dtype, point.weights) == ("forward", "fp32", "hot") else []
    return [(*ALONE, *more), *fastkron]


def problem(point: Point) -> OpProblem:
    copies = COLD_COPIES if point.weights == "cold" else 1
    return OpProblem(ALL_CASES[point.case], *point.sizes, DTYPES[point.dtype], point.backward, copies)


candidate = op_candidate


def beside(problem: OpProblem) -> list[Variant]:
    """A square matrix product in the same rounds: the rate of the machine at that moment."""
    return [square_product(problem.dtype)[0]]


def columns(problem: OpProblem, candidate: Candidate, timings: Mapping[str, Timing | None]) -> dict[str, Any]:
    """Factors, operations saved, and for the factored candidates the share of the square product's rate."""
    case = problem.case
    row: dict[str, Any] = {"factors": str(case), "saving": case.dense_macs / case.macs}
    square, flop = square_product(problem.dtype)
    mine, peak = timings.get(candidate.name), timings.get(square.name)
    if mine and peak and "weight" not in candidate.operands:
        # Forward and backward do the forward's work three times: y, dx, and the gradients of the factors.
        work = 2 * case.macs * problem.tokens * (3 if problem.backward else 1)
        row["peak_share"] = (work / mine.seconds.q50) / (flop / peak.seconds.q50)
    return row


def memory_names(point: Point) -> tuple[str, ...]:
    shown = (point.direction, point.weights, point.input) == ("forward", "hot", "1024")
    return ("dense", "torch.kron + linear", "matmul", "LyCORIS", "kron_kernels") if shown else ()


def memory(point: Point, name: str) -> int | None:
    """Return what one call adds to the process at the peak beyond its output, in bytes."""
    small, whole = (problem(Point(point.case, point.direction, point.dtype, size)) for size in ("2", point.input))
    small.runner(candidate(small, name))()
    growth = peak_memory_growth(whole.runner(candidate(whole, name)))
    return None if growth is None else max(0, growth - whole.grad.nbytes)
