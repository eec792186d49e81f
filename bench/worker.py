"""The child process that measures: a crash, a foreign thread pool or a leak stays in it.

Reads a job as JSON from its argument and writes one JSON object a line to stdout: ``{"starting": name}`` before a
candidate first runs, ``{"point": index, "result": {...}}`` for each result, ``{"done": index}`` after each point.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch

from bench.candidates import MAKERS, Missing
from bench.ffn_candidates import FFN_MAKERS
from bench.points import Point
from bench.protocol import Say, protocol
from kron_kernels import backends
from kron_kernels.testing import PEAK, GemmPeak, gemm_peak, peak_memory_growth
from kron_kernels.testing.compare import Result, compare, first_line
from kron_kernels.testing.ffn import FfnProblem
from kron_kernels.testing.layers import LayerProblem
from kron_kernels.testing.problem import Candidate

T = TypeVar("T")


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    {"time": _time_points, "memory": _memory_points}[job["kind"]](job, say)


def _time_points(job: dict[str, Any], say: Say) -> None:
    for point in job["points"]:
        index = point["index"]
        problem = _point(point).problem()
        makers = _makers(problem)
        results, candidates = make_all({name: makers[name] for name in point["candidates"]}, problem, say)
        peak = gemm_peak(problem.dtype)
        results += compare(
            problem,
            candidates,
            seconds=job["seconds"],
            starting=lambda name: say({"starting": name}),
            beside=[peak.variant],
            over=[PEAK],
        )
        rates = [peak.flop / result.timing.seconds.q50 for result in results if result.name == PEAK and result.timing]
        for result in results:
            say({"point": index, "result": _row(result, peak, *rates)})
        say({"done": index})


def _memory_points(job: dict[str, Any], say: Say) -> None:
    """Peak growth of the resident set over one forward; the parent sets the allocator to give memory back at once."""
    for point in job["points"]:
        problem = _point(point).problem()
        few = _point({**point, "tokens": 2}).problem()
        for name in point["candidates"]:
            say({"starting": name})
            with contextlib.suppress(Missing):
                candidate = _makers(problem)[name](problem)
                few.runner(candidate)()
                growth = peak_memory_growth(problem.runner(candidate))
                scratch = None
                if name == "kron_kernels" and backends.available()["cpu"].available:
                    scratch = backends.introspect().last_scratch_bytes()
                output = problem.tokens * problem.case.shape[0] * problem.x.element_size()
                row = {"variant": name, "peak": growth, "output": output, "scratch": scratch}
                say({"point": point["index"], "result": row})
        say({"done": point["index"]})


def make_all(makers: Mapping[str, Callable[[Any], T]], problem: object, say: Say) -> tuple[list[Result], list[T]]:
    """The candidates that the makers give, and results of those that cannot run here."""
    results, candidates = [], []
    for name, make in makers.items():
        say({"starting": name})
        try:
            candidates.append(make(problem))
        except Missing as reason:
            results.append(Result(name, "skipped", str(reason)))
        except Exception as failure:
            results.append(Result(name, "failed", first_line(failure)))
    return results, candidates


def _point(described: dict[str, Any]) -> Point:
    return Point(**{field.name: described[field.name] for field in fields(Point)})


def _makers(problem: LayerProblem | FfnProblem) -> Mapping[str, Callable[[Any], Candidate]]:
    return FFN_MAKERS if isinstance(problem, FfnProblem) else MAKERS


def result_row(result: Result, unit: str, over: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A result in columns, times in ``unit`` ("us", "ms").

    ``over`` names the ways whose ratios become columns, with the prefixes of those.
    """
    row: dict[str, Any] = {
        "variant": result.name,
        "status": result.status,
        "reason": result.reason,
        "error": result.error,
    }
    if result.timing is not None:
        row |= result.timing.columns(unit)
    for name, prefix in (over or {}).items():
        if (ratio := (result.over or {}).get(name)) is not None:
            row |= {f"{prefix}_{quantile}": getattr(ratio, quantile) for quantile in ("q10", "q50", "q90")}
    return row


def _row(result: Result, peak: GemmPeak, rate: float = 0.0) -> dict[str, Any]:
    """A result in columns; ``rate`` is that of the square product of the same run, operations a second."""
    row = result_row(result, "us")
    if result.timing is not None:
        row |= {"peak_gflops": rate / 1e9, "peak_flop": peak.flop, "over_peak": (result.over or {})[PEAK].q50}
    if result.name == PEAK:
        row["factors"] = peak.label
    return row


if __name__ == "__main__":
    main()
