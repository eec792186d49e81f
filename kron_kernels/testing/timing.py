"""Check candidates against float64, then time the right ones in turns, so that a noisy machine disturbs all alike.

The figure to trust is the ratio within one round; its quantiles over the rounds are what is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

BASELINE = "dense"
# A timing whose 10 % and 90 % quantiles differ by more than this factor is disturbed: it is taken again.
STEADY = 3.0
Clock = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Variant:
    """Something to time: ``run()`` computes once; ``rest_seconds`` is a pause around each turn, for thread pools."""

    name: str
    run: Callable[[], object]
    rest_seconds: float = 0.0


@dataclass(frozen=True)
class Quantiles:
    """The 10 %, 50 % and 90 % quantiles of a sample."""

    q10: float
    q50: float
    q90: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Quantiles:
        """Return the quantiles of a non-empty sample, interpolated between its values."""
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        deciles = statistics.quantiles(sample, n=10, method="inclusive")
        return cls(deciles[0], statistics.median(sample), deciles[8])


@dataclass(frozen=True)
class Timing:
    """Seconds a call, and how many times faster than the baseline of the same round."""

    name: str
    seconds: Quantiles
    speedup: Quantiles
    rounds: int

    @property
    def steady(self) -> bool:
        return self.seconds.q90 <= STEADY * self.seconds.q10

    def columns(self, unit: str) -> dict[str, float]:
        """Return the figures by name, as tables keep them; times in ``unit``, "us" or "ms"."""
        scale = {"us": 1e6, "ms": 1e3}[unit]
        row: dict[str, float] = {"rounds": self.rounds}
        for name in ("q10", "q50", "q90"):
            row[f"time_{unit}_{name}"] = getattr(self.seconds, name) * scale
            row[f"speedup_{name}"] = getattr(self.speedup, name)
        return row


@dataclass(frozen=True)
class Result:
    """One candidate: "ok", "noisy" (timed, but disturbed), "wrong" (not timed), "failed" (raised) or "skipped"."""

    name: str
    status: str
    reason: str = ""
    error: float | None = None
    timing: Timing | None = None


class Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def rest_seconds(self) -> float: ...


CandidateT = TypeVar("CandidateT", bound=Named, contravariant=True)


class Problem(Protocol[CandidateT]):
    """What judges and runs candidates: an error against float64, its tolerance, a function to time."""

    def error(self, candidate: CandidateT, /) -> float: ...

    def tolerance(self, candidate: CandidateT, /) -> float: ...

    def runner(self, candidate: CandidateT, /) -> Callable[[], object]: ...


def host_clock(run: Callable[[], object], calls: int) -> float:
    """Return the seconds a call of several in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


class CudaClock:
    """Time calls on the current CUDA device with an empty L2 cache; the host's time is not in the figure."""

    def __init__(self, flush_bytes: int = 256 * 2**20, spin_cycles: int = 500_000) -> None:
        self._flush = torch.zeros(flush_bytes // 4, device="cuda")
        self._spin_cycles = spin_cycles

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        return statistics.median(self._seconds(run) for _ in range(calls))

    def median(self, run: Callable[[], object], seconds: float = 0.02) -> float:
        """Return the median seconds of 5 to 100 calls, as many as the time allows."""
        once = max(self(run, 3), 1e-6)
        return self(run, max(5, min(100, int(seconds / once))))

    def _seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Reading leaves clean lines in L2: after a write alone the timed call would pay for writing them back.
        self._flush.sum()
        # Spins until the host has queued the call, else its time would pass for the device's.
        torch.cuda._sleep(self._spin_cycles)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def interleave(
    variants: Sequence[Variant],
    baseline: str,
    *,
    seconds: float = 0.3,
    max_rounds: int = 15,
    min_rounds: int = 5,
    clock: Clock = host_clock,
) -> list[Timing]:
    """Time the variants in rotation, about ``seconds`` each in ``min_rounds`` to ``max_rounds`` rounds.

    Returns one :class:`Timing` a variant, in the order given, with speed-ups over ``baseline``. Raises ValueError where
    names repeat or the baseline is not among them.
    """
    names = [variant.name for variant in variants]
    if len(set(names)) != len(names) or baseline not in names:
        raise ValueError(f"variants: expected different names with {baseline!r} among them, got {names}")
    once = [_warm(variant, seconds / 10, clock) for variant in variants]
    rounds = max(min_rounds, min(max_rounds, int(seconds / max(once))))
    calls = [max(1, round(seconds / rounds / each)) for each in once]
    turns: list[list[float]] = [[] for _ in variants]
    for first in range(rounds):
        for step in range(len(variants)):
            # A different variant opens each round, so none always runs behind the same neighbour.
            index = (first + step) % len(variants)
            rest = variants[index].rest_seconds
            time.sleep(rest)
            turns[index].append(clock(variants[index].run, calls[index]))
            time.sleep(rest)
    base = turns[names.index(baseline)]
    speedups = [Quantiles.of([theirs / ours for theirs, ours in zip(base, mine, strict=True)]) for mine in turns]
    return [Timing(*each, rounds) for each in zip(names, map(Quantiles.of, turns), speedups, strict=True)]


def compare(
    problem: Problem[CandidateT],
    candidates: Sequence[CandidateT],
    *,
    seconds: float = 0.3,
    starting: Callable[[str], None] = lambda name: None,
    beside: Sequence[Variant] = (),
    clock: Clock = host_clock,
    time_wrong: bool = False,
    attempts: int = 3,
) -> list[Result]:
    """Check every candidate against float64, then time those that are right, interleaved, over "dense".

    ``starting(name)`` is called before a candidate first runs: should the process die, its parent knows of whom.
    ``beside`` takes turns in the same rounds unchecked. ``time_wrong`` times wrong candidates too, who stay "wrong".
    Timings that are not steady are taken again, ``attempts`` times at most. Nothing is timed without a right baseline.
    """
    results = {candidate.name: _check(problem, candidate, starting) for candidate in candidates}
    timed = ("ok", "wrong") if time_wrong else ("ok",)
    right = [candidate for candidate in candidates if results[candidate.name].status in timed]
    if BASELINE not in [candidate.name for candidate in right]:
        reason = "no dense baseline to compare with"
        return [replace(each, status="failed", reason=each.reason or reason) for each in results.values()]
    starting("timing")
    variants = [Variant(candidate.name, problem.runner(candidate), candidate.rest_seconds) for candidate in right]
    for _ in range(attempts):
        timings = interleave([*variants, *beside], BASELINE, seconds=seconds, clock=clock)
        if all(timing.steady for timing in timings):
            break
    for timing in timings:
        found = results.get(timing.name, Result(timing.name, "ok"))
        if found.status == "ok" and not timing.steady:
            found = replace(found, status="noisy", reason=f"quantiles differ by more than {STEADY:g}x")
        results[timing.name] = replace(found, timing=timing)
    return list(results.values())


def first_line(failure: Exception) -> str:
    """Return what an exception says, in one line short enough for a table."""
    return f"{type(failure).__name__}: {failure}".split("\n")[0][:200]


def _check(problem: Problem[Any], candidate: Any, starting: Callable[[str], None]) -> Result:
    starting(candidate.name)
    try:
        error, tolerance = problem.error(candidate), problem.tolerance(candidate)
    except Exception as failure:  # a peer may raise anything, and must not end the run
        return Result(candidate.name, "failed", first_line(failure))
    if not error <= tolerance:
        return Result(candidate.name, "wrong", f"relative error {error:.1e} above {tolerance:.0e}", error)
    return Result(candidate.name, "ok", error=error)


def _warm(variant: Variant, at_least: float, clock: Clock) -> float:
    """Run until warm; returns the seconds of the quickest call."""
    quickest, end = float("inf"), time.perf_counter() + min(at_least, 0.1)
    while quickest == float("inf") or time.perf_counter() < end:
        quickest = min(quickest, clock(variant.run, 1))
    return max(quickest, 1e-7)
