"""Interleaved timing: every variant takes its turn in every round, so that a noisy machine disturbs all alike.

The figure to trust is the ratio inside one round; its quantiles over the rounds are what is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to compute the same thing.

    Args:
        name: how the tables call it.
        run: computes once; what it returns is dropped inside the timed region.
        rest_seconds: pause before and after each turn, for a library whose own thread pool keeps spinning.
    """

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
        """Quantiles of a non-empty sample, interpolated between its values."""
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        deciles = statistics.quantiles(sample, n=10, method="inclusive")
        return cls(deciles[0], statistics.median(sample), deciles[8])


@dataclass(frozen=True)
class Timing:
    """What one variant took: seconds a call, and how many times faster than the baseline of the same round.

    ``turns`` are the seconds a call of each round, in the order of the rounds.
    """

    name: str
    seconds: Quantiles
    speedup: Quantiles
    rounds: int
    calls: int
    turns: tuple[float, ...]

    def speedup_over(self, other: Timing) -> Quantiles:
        """How many times faster than another variant of the same run, round by round."""
        return _speedup(other.turns, self.turns)

    def columns(self, unit: str) -> dict[str, float]:
        """The figures by name, as tables keep them; times in ``unit``, "us" or "ms"."""
        scale = {"us": 1e6, "ms": 1e3}[unit]
        row: dict[str, float] = {"rounds": self.rounds, "calls": self.calls}
        for name in ("q10", "q50", "q90"):
            row[f"time_{unit}_{name}"] = getattr(self.seconds, name) * scale
            row[f"speedup_{name}"] = getattr(self.speedup, name)
        return row


def interleave(
    variants: Sequence[Variant],
    baseline: str,
    *,
    seconds: float = 0.3,
    warmup_seconds: float = 0.03,
    max_rounds: int = 15,
    min_rounds: int = 5,
) -> list[Timing]:
    """Time the variants in rotation.

    Args:
        variants: what to time; names must differ.
        baseline: name of the variant the speed-ups are over.
        seconds: time to spend on each variant, warm-up apart. A variant too slow for ``min_rounds`` turns in that
            time takes longer.
        warmup_seconds: untimed calls of each variant before the first round last at least this long (one call at
            least).
        max_rounds, min_rounds: bounds of the number of rounds.

    Returns:
        One :class:`Timing` a variant, in the order given.

    Raises:
        ValueError: names that repeat, or a baseline that is not among them.
    """
    names = [variant.name for variant in variants]
    if len(set(names)) != len(names):
        raise ValueError(f"variants: names must differ, got {names}")
    if baseline not in names:
        raise ValueError(f"baseline: expected one of {names}, got {baseline!r}")

    once = [_warm(variant, warmup_seconds) for variant in variants]
    rounds = max(min_rounds, min(max_rounds, int(seconds / max(once))))
    calls = [max(1, round(seconds / rounds / each)) for each in once]
    turns: list[list[float]] = [[] for _ in variants]
    for round_index in range(rounds):
        for step in range(len(variants)):
            # A different variant opens each round, so none always runs behind the same neighbour.
            index = (round_index + step) % len(variants)
            turns[index].append(_turn(variants[index], calls[index]))

    base = turns[names.index(baseline)]
    return [
        Timing(
            name=variant.name,
            seconds=Quantiles.of(mine),
            speedup=_speedup(base, mine),
            rounds=rounds,
            calls=rounds * count,
            turns=tuple(mine),
        )
        for variant, mine, count in zip(variants, turns, calls, strict=True)
    ]


def _speedup(base: Sequence[float], mine: Sequence[float]) -> Quantiles:
    return Quantiles.of([theirs / ours for theirs, ours in zip(base, mine, strict=True)])


def _warm(variant: Variant, at_least: float) -> float:
    """Run until warm; returns the seconds of the quickest call."""
    quickest, spent = float("inf"), 0.0
    while spent < at_least:
        start = time.perf_counter()
        variant.run()
        took = time.perf_counter() - start
        quickest, spent = min(quickest, took), spent + took
    return max(quickest, 1e-7)


def _turn(variant: Variant, calls: int) -> float:
    """Seconds a call over one turn of ``calls`` calls."""
    run = variant.run
    if variant.rest_seconds:
        time.sleep(variant.rest_seconds)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    took = (time.perf_counter() - start) / calls
    if variant.rest_seconds:
        time.sleep(variant.rest_seconds)
    return took
