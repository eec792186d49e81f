"""The feed-forward block W1 - GELU - W2 and Q, K, V of BERT-base: dense, stock products and this package."""

from __future__ import annotations

from bench.suites import Point
from bench.suites.layers import (
    COLUMNS,
    DTYPES,
    OURS,
    TOKENS,
    beside,
    candidate,
    columns,
    memory,
    op_points,
    problem,
)
from kron_kernels.testing.problems import FFN_CASES, QKV_CASES

__all__ = ["COLUMNS", "beside", "candidate", "columns", "groups", "memory", "memory_names", "points", "problem"]
SECONDS = 0.3


def points(quick: bool) -> list[Point]:
    """Forward of blocks and projections, then backward on whole batches, then cold weights."""
    if quick:
        return op_points(["k21-ffn"], ["fp32"], (3,), ())
    return op_points([*FFN_CASES, *QKV_CASES], list(DTYPES), TOKENS, (1024, 4096))


def groups(point: Point) -> list[tuple[str, ...]]:
    compiled = ("dense, compiled", "matmul, compiled") if point.weights == "hot" else ()
    return [("dense", "dense, packed", *compiled, "matmul", *OURS)]


def memory_names(point: Point) -> tuple[str, ...]:
    shown = (point.direction, point.weights, point.input) == ("forward", "hot", "1024")
    return ("dense", "matmul", "kron_kernels") if shown else ()
