"""Timing on a CUDA device: each call by itself between two events, behind a write that empties the L2 cache.

The write takes longer than starting a kernel does, so that the host is always ahead and what is timed is the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .interleaving import Quantiles, Timing, Variant

# More than the L2 of any device so far, and long enough to write that the host gets ahead.
_FLUSH_BYTES = 256 * 2**20
_WARM_CALLS = 3


class Clock:
    """Times calls on the current device."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def times(self, run: Callable[[], object], calls: int) -> list[float]:
        """Seconds of each of some calls."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def median(self, run: Callable[[], object], seconds: float = 0.02) -> float:
        """Median seconds of a call, warm-up apart, from as many calls as the time allows: 5 to 100."""
        self.times(run, _WARM_CALLS)
        begin = time.perf_counter()
        self.times(run, 2)
        each = (time.perf_counter() - begin) / 2
        return statistics.median(self.times(run, max(5, min(100, int(seconds / each)))))

    def interleave(self, variants: Sequence[Variant], baseline: str, *, seconds: float = 0.1) -> list[Timing]:
        """As ``timing.interleave``: variants take turns, a call a turn, and ratios are those of one round."""
        for variant in variants:
            self.times(variant.run, _WARM_CALLS)
        once = [max(self.times(variant.run, 1)[0], 1e-6) for variant in variants]
        rounds = max(7, min(100, int(seconds / max(once))))
        turns: list[list[float]] = [[] for _ in variants]
        for round_index in range(rounds):
            for step in range(len(variants)):
                # A different variant opens each round, so none always runs behind the same neighbour.
                index = (round_index + step) % len(variants)
                turns[index] += self.times(variants[index].run, 1)
        base = next(mine for variant, mine in zip(variants, turns, strict=True) if variant.name == baseline)
        return [
            Timing(
                variant.name,
                Quantiles.of(mine),
                Quantiles.of([theirs / ours for theirs, ours in zip(base, mine, strict=True)]),
                rounds,
                rounds,
                tuple(mine),
            )
            for variant, mine in zip(variants, turns, strict=True)
        ]


def wall_seconds(run: Callable[[], object], calls: int = 50) -> float:
    """Seconds a call of several in a row, the host's time included: what counts where kernels are short."""
    for _ in range(_WARM_CALLS):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def copy_bandwidth(clock: Clock, size: int = 2**30) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / clock.median(lambda: target.copy_(source), 0.1)


def gemm_rate(clock: Clock, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second of a square ``torch.mm``."""
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device="cuda", dtype=dtype)
    return 2 * size**3 / clock.median(lambda: torch.mm(left, right, out=out), 0.1)
