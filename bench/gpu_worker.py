"""The child process that measures on a GPU: a crash or a hanging kernel stays in it. It talks as bench.worker does.

Kinds of jobs: "time" (points), "repeat" (equal results, time after time), "small" (every kernel once, for a sanitizer),
"once" (one candidate at one point, for a profiler), "encoder" and "train" (whole models).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.candidates import Missing
from bench.gpu_candidates import BACKENDS, makers_of
from bench.gpu_models import encoder_points, train_points
from bench.gpu_problems import GpuProblem, Point
from bench.protocol import Say, protocol
from bench.worker import make_all, result_row
from kron_kernels.timing import Timing, Variant, cuda, interleave
from kron_kernels.timing.compare import compare
from kron_kernels.timing.problem import Candidate

# Fewer calls are enough to see what a profiler counts.
_PROFILED_CALLS = 3


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
            for _ in range(_PROFILED_CALLS):
                run()
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return round(len(on_device) / _PROFILED_CALLS)


def _one_round(variants: Sequence[Variant], baseline: str, *, seconds: float) -> list[Timing]:
    """For a rehearsal: as little as gives a figure."""
    return interleave(variants, baseline, seconds=seconds, warmup_seconds=0.0, max_rounds=1, min_rounds=1)


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    machine = Machine(job["device"])
    kinds: dict[str, Callable[[dict[str, Any], Say, Machine], None]] = {
        "time": time_points,
        "repeat": repeat_points,
        "small": small_points,
        "once": once,
        "encoder": encoder_points,
        "train": train_points,
    }
    kinds[job["kind"]](job, say, machine)


def time_points(job: dict[str, Any], say: Say, machine: Machine) -> None:
    """Check every candidate of each point, then time those that are right, in turns."""
    rates: dict[torch.dtype, tuple[float, float]] = {}
    for described in job["points"]:
        point = point_of(described)
        problem = point.problem(machine.device, job["rehearse"])
        makers = makers_of(point.kind)
        results, candidates = make_all({name: makers[name] for name in described["candidates"]}, problem, say)
        results += compare(
            problem, candidates, seconds=job["seconds"], starting=announcer(machine, say), timer=machine.timer
        )
        machine.check()
        if problem.dtype not in rates:
            rates[problem.dtype] = machine.rates(problem.dtype)
        by_name = {candidate.name: candidate for candidate in candidates}
        for result in results:
            row = result_row(result, "us")
            if result.timing is not None:
                run = problem.runner(by_name[result.name])
                row |= {"wall_us": machine.wall_us(run), "launches": machine.launches(run)}
                row |= floor(problem, *rates[problem.dtype], result.timing.seconds.q50)
            say({"point": described["index"], "result": row})
        say({"done": described["index"]})
        del problem, candidates, by_name
        if machine.device == "cuda":
            torch.cuda.empty_cache()


def announcer(machine: Machine, say: Say) -> Callable[[str], None]:
    """Says which way starts, unless the one before it has spoilt the device."""

    def starting(name: str) -> None:
        machine.check()
        say({"starting": name})

    return starting


def floor(problem: GpuProblem, bandwidth: float, rate: float, seconds: float) -> dict[str, float]:
    """The least time of the problem at the rates measured, and its share of the time taken."""
    work = problem.work()
    least = max(work.bytes / bandwidth, work.flop / rate)
    return {
        "floor_us": 1e6 * least,
        "floor_share": least / seconds,
        "copy_gbs": bandwidth / 1e9,
        "gemm_tflops": rate / 1e12,
    }


def repeat_points(job: dict[str, Any], say: Say, machine: Machine) -> None:
    """Each way of ours again and again: equal bits each time, and a digest to compare with another process's."""
    for described in job["points"]:
        point = point_of(described)
        problem = point.problem(machine.device, job["rehearse"])
        for candidate in _ours(point, problem, say):
            run = problem.runner(candidate)
            first = list(tensors(run()))
            differing = sum(
                any(not torch.equal(one, again) for one, again in zip(first, tensors(run()), strict=True))
                for _ in range(job["times"])
            )
            row = {"variant": candidate.name, "times": job["times"], "differing": differing, "digest": digest(first)}
            say({"point": described["index"], "result": row})
        say({"done": described["index"]})


def small_points(job: dict[str, Any], say: Say, machine: Machine) -> None:
    """Each way of ours once, checked, to an exit code: under a sanitizer that is slow enough."""
    for described in job["points"]:
        point = point_of(described)
        problem = point.problem(machine.device, job["rehearse"])
        for candidate in _ours(point, problem, say):
            error = problem.error(candidate)
            row = {"variant": candidate.name, "error": error, "right": error <= problem.tolerance(candidate)}
            say({"point": described["index"], "result": row})
            if not row["right"]:
                sys.exit(1)
        say({"done": described["index"]})


def once(job: dict[str, Any], say: Say, machine: Machine) -> None:
    """One candidate at one point, a few times."""
    (described,) = job["points"]
    point = point_of(described)
    problem = point.problem(machine.device, job["rehearse"])
    (name,) = described["candidates"]
    run = problem.runner(makers_of(point.kind)[name](problem))
    for _ in range(_PROFILED_CALLS):
        run()
    if machine.device == "cuda":
        torch.cuda.synchronize()
    say({"done": described["index"]})


def _ours(point: Point, problem: GpuProblem, say: Say) -> Iterable[Candidate]:
    makers = makers_of(point.kind)
    for name in BACKENDS:
        if name in makers:
            say({"starting": name})
            try:
                candidate = makers[name](problem)
            except Missing:
                continue
            if not problem.refusal(candidate):
                yield candidate


def point_of(described: Mapping[str, Any]) -> Point:
    return Point(**{name: described[name] for name in ("case", "tokens", "dtype", "backward")})


def tensors(results: Any) -> Iterable[Tensor]:
    return (results,) if isinstance(results, Tensor) else results


def digest(results: Iterable[Tensor]) -> str:
    """Of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in results:
        found.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
    # A context that a sanitizer or a failed kernel has spoilt must not be torn down by Python.
    sys.stdout.flush()
    os._exit(0)
