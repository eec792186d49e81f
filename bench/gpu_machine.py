"""Where a job of bench.gpu runs, and how ways are compared there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.protocol import Say
from bench.worker import make_all, result_row
from kron_kernels.testing import Timing, Variant, cuda, interleave
from kron_kernels.testing.compare import Result, compare

# Fewer calls are enough to see what a profiler counts.
PROFILED_CALLS = 3


class Machine:
    """Where a job runs: a GPU, or the CPU in a rehearsal, whose figures mean nothing."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._clock = cuda.Clock() if device == "cuda" else None
        self.timer: Callable[..., Any] = self._clock.interleave if self._clock else _one_round

    def rates(self, dtype: torch.dtype) -> tuple[float, float]:
        """Bytes a second of a copy, operations a second of a large product."""
        if self._clock is None:
            return 1e10, 1e10
        return cuda.copy_bandwidth(self._clock), cuda.gemm_rate(self._clock, dtype)

    def check(self) -> None:
        """Ends the process where a kernel has spoilt the device's context: what failed last is to blame."""
        if self._clock is not None:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(70)

    def wall_us(self, run: Callable[[], object]) -> float | None:
        """Microseconds a call, the host's included."""
        return 1e6 * cuda.wall_seconds(run) if self._clock else None

    def launches(self, run: Callable[[], object]) -> int | None:
        """Kernels, copies and fills that a call starts."""
        if self._clock is None:
            return None
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED_CALLS):
                run()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return round(len(on_device) / PROFILED_CALLS)

    def starting(self, say: Say) -> Callable[[str], None]:
        """Says which way starts, unless the one before it has spoilt the device."""

        def announce(name: str) -> None:
            self.check()
            say({"starting": name})

        return announce

    def compared(
        self, makers: Mapping[str, Callable[[Any], Any]], problem: Any, seconds: float, say: Say
    ) -> list[tuple[Result, dict[str, Any]]]:
        """Every way checked, then those that are right timed in turns; each with the columns of its row."""
        results, candidates = make_all(makers, problem, say)
        results += compare(problem, candidates, seconds=seconds, starting=self.starting(say), timer=self.timer)
        self.check()
        by_name = {candidate.name: candidate for candidate in candidates}
        found = []
        for result in results:
            row = result_row(result, "us")
            if result.timing is not None:
                run = problem.runner(by_name[result.name])
                row |= {"wall_us": self.wall_us(run), "launches": self.launches(run)}
            found.append((result, row))
        return found


def _one_round(variants: Sequence[Variant], baseline: str, *, seconds: float) -> list[Timing]:
    """For a rehearsal: as little as gives a figure."""
    return interleave(variants, baseline, seconds=seconds, warmup_seconds=0.0, max_rounds=1, min_rounds=1)
