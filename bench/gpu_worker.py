"""The child process that measures on a GPU: a crash or a hanging kernel stays in it. It talks as bench.worker does.

Kinds of jobs: "time" (points), "repeat" (equal results, time after time), "small" (every kernel once, for a sanitizer),
"once" (one candidate at one point, for a profiler), "encoder" and "train" (whole models).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.candidates import Missing
from bench.gpu_candidates import BACKENDS, makers_of
from bench.gpu_machine import PROFILED_CALLS, Machine
from bench.gpu_models import encoder_points, train_points
from bench.gpu_problems import GpuProblem, Point
from bench.protocol import Say, protocol
from kron_kernels.testing.problem import Candidate


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
        compared = machine.compared(
            {name: makers[name] for name in described["candidates"]}, problem, job["seconds"], say
        )
        if problem.dtype not in rates:
            rates[problem.dtype] = machine.rates(problem.dtype)
        for result, row in compared:
            if result.timing is not None:
                row |= floor(problem, *rates[problem.dtype], result.timing.seconds.q50)
            say({"point": described["index"], "result": row})
        say({"done": described["index"]})
        del problem, compared
        if machine.device == "cuda":
            torch.cuda.empty_cache()


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
    for _ in range(PROFILED_CALLS):
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
