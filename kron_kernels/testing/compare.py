"""Check first, then time: a candidate that computes wrongly gets no figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .interleaving import Quantiles, Timing, Variant, interleave

BASELINE = "dense"


class Way(Protocol):
    """A candidate: its name, and how long it rests before and after its turns."""

    @property
    def name(self) -> str: ...

    @property
    def rest_seconds(self) -> float: ...


WayT = TypeVar("WayT", bound=Way, contravariant=True)


class Checked(Protocol[WayT]):
    """A problem that can judge and run candidates, as ``timing.problem.Problem`` does."""

    def refusal(self, candidate: WayT, /) -> str: ...

    def tolerance(self, candidate: WayT, /) -> float: ...

    def error(self, candidate: WayT, /) -> float: ...

    def runner(self, candidate: WayT, /) -> Callable[[], object]: ...


@dataclass(frozen=True)
class Result:
    """What became of one candidate.

    ``status`` is "ok" (checked and timed), "wrong" (its error is above the tolerance: not timed), "failed" (it
    raised) or "skipped"; ``reason`` says more unless it is ok. ``error`` is the largest relative error against float64.
    ``over`` holds, by the names asked for, how many times faster it was than those, round by round.
    """

    name: str
    status: str
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None
    over: dict[str, Quantiles] | None = None


def compare(
    problem: Checked[WayT],
    candidates: Sequence[WayT],
    *,
    seconds: float = 0.3,
    starting: Callable[[str], None] = lambda name: None,
    beside: Sequence[Variant] = (),
    over: Sequence[str] = (),
    timer: Callable[..., list[Timing]] = interleave,
) -> list[Result]:
    """Check every candidate against float64, then time those that are right, interleaved, over dense.

    Args:
        problem: what to compute.
        candidates: ways to compute it; "dense" must be among them.
        seconds: time to spend on each.
        starting: called with a candidate's name before it first runs: who died is known should the process die.
        beside: what takes its turns in the same rounds though it computes something else, and is not checked.
        over: names of candidates or of ``beside`` to compare every candidate with besides dense.
        timer: ``interleave``, or what times on another device and is called alike.

    Returns:
        One :class:`Result` a candidate, in the order given, then one for each of ``beside``. Should dense itself be
        wrong, nothing is timed.
    """
    checked = [_check(problem, candidate, starting) for candidate in candidates]
    right = [candidate for candidate, result in zip(candidates, checked, strict=True) if result.status == "ok"]
    if not any(candidate.name == BASELINE for candidate in right):
        return [
            Result(result.name, "failed", "no dense baseline to compare with", result.error)
            if result.status == "ok"
            else result
            for result in checked
        ]
    starting("timing")
    variants = [Variant(candidate.name, problem.runner(candidate), candidate.rest_seconds) for candidate in right]
    timings = {timing.name: timing for timing in timer([*variants, *beside], BASELINE, seconds=seconds)}
    others = {name: timings[name] for name in over if name in timings}
    results = [*checked, *(Result(variant.name, "ok") for variant in beside)]
    return [_timed(result, timings.get(result.name), others) for result in results]


def _timed(result: Result, timing: Timing | None, others: dict[str, Timing]) -> Result:
    if timing is None:
        return result
    over = {name: timing.speedup_over(other) for name, other in others.items()}
    return Result(result.name, result.status, result.reason, result.error, timing, over)


def _check(problem: Checked[WayT], candidate: WayT, starting: Callable[[str], None]) -> Result:
    if refusal := problem.refusal(candidate):
        return Result(candidate.name, "skipped", refusal)
    starting(candidate.name)
    try:
        error = problem.error(candidate)
    except Exception as failure:  # a peer may raise anything, and must not end the run
        return Result(candidate.name, "failed", first_line(failure))
    tolerance = problem.tolerance(candidate)
    if not error <= tolerance:
        return Result(candidate.name, "wrong", f"relative error {error:.1e} above {tolerance:.0e}", error)
    return Result(candidate.name, "ok", error=error)


def first_line(failure: Exception) -> str:
    """What an exception says, in one line short enough for a table."""
    return f"{type(failure).__name__}: {failure}".split("\n")[0][:200]
