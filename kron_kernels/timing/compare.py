"""Check first, then time: a candidate that computes wrongly gets no figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .interleaving import Timing, Variant, interleave
from .layers import DENSE, TOLERANCE, Candidate, LayerProblem


@dataclass(frozen=True)
class Result:
    """What became of one candidate.

    ``status`` is "ok" (checked and timed), "wrong" (its error is above the tolerance: not timed), "failed" (it
    raised) or "skipped"; ``reason`` says more unless it is ok. ``error`` is the largest relative error against float64.
    """

    name: str
    status: str
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None


def compare(
    problem: LayerProblem,
    candidates: Sequence[Candidate],
    *,
    seconds: float = 0.3,
    starting: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Check every candidate against float64, then time those that are right, interleaved, over dense.

    Args:
        problem: what to compute.
        candidates: ways to compute it; dense must be among them.
        seconds: time to spend on each.
        starting: called with a candidate's name before it first runs: who died is known should the process die.

    Returns:
        One :class:`Result` a candidate, in the order given. Should dense itself be wrong, nothing is timed.
    """
    tolerance = TOLERANCE[problem.dtype]
    checked = [_check(problem, candidate, tolerance, starting) for candidate in candidates]
    right = [candidate for candidate, result in zip(candidates, checked, strict=True) if result.status == "ok"]
    if DENSE not in right:
        return [
            Result(result.name, "failed", "no dense baseline to compare with", result.error)
            if result.status == "ok"
            else result
            for result in checked
        ]
    starting("timing")
    variants = [Variant(candidate.name, problem.runner(candidate), candidate.rest_seconds) for candidate in right]
    timings = {timing.name: timing for timing in interleave(variants, DENSE.name, seconds=seconds)}
    return [
        Result(result.name, result.status, result.reason, result.error, timings.get(result.name)) for result in checked
    ]


def _check(problem: LayerProblem, candidate: Candidate, tolerance: float, starting: Callable[[str], None]) -> Result:
    if problem.backward and candidate.differentiates is None:
        return Result(candidate.name, "skipped", "forward only")
    starting(candidate.name)
    try:
        error = problem.error(candidate)
    except Exception as failure:  # a peer may raise anything, and must not end the run
        return Result(candidate.name, "failed", f"{type(failure).__name__}: {failure}".split("\n")[0][:200])
    if not error <= tolerance:
        return Result(candidate.name, "wrong", f"relative error {error:.1e} above {tolerance:.0e}", error)
    return Result(candidate.name, "ok", error=error)
