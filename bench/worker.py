"""The child process that measures: a crash, a foreign thread pool or a leak stays in it.

Reads a job as JSON from its argument and writes one JSON object a line to stdout: ``{"starting": name}`` before a
candidate first runs, ``{"point": index, "result": {...}}`` for each result, ``{"done": index}`` after each point.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.candidates import MAKERS, Missing
from kron_kernels import _backends
from kron_kernels.cli.bench import DTYPES
from kron_kernels.timing import gemm_peak_gflops, peak_memory_growth
from kron_kernels.timing.compare import Result, compare
from kron_kernels.timing.layers import CASES, LayerProblem

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    {"time": _time_points, "memory": _memory_points, "peak": _peak}[job["kind"]](job, say)


def protocol() -> Say:
    """A function that writes one message; whatever libraries print goes to stderr from here on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return say


def _peak(_job: dict[str, Any], say: Say) -> None:
    for name, dtype in DTYPES.items():
        say({"dtype": name, "gflops": gemm_peak_gflops(dtype)})


def _time_points(job: dict[str, Any], say: Say) -> None:
    for point in job["points"]:
        index = point["index"]
        problem = _problem(point)
        results, candidates = [], []
        for name in point["candidates"]:
            say({"starting": name})
            try:
                candidates.append(MAKERS[name](problem))
            except Missing as reason:
                results.append(Result(name, "skipped", str(reason)))
            except Exception as failure:
                results.append(Result(name, "failed", f"{type(failure).__name__}: {failure}".split("\n")[0][:200]))
        results += compare(problem, candidates, seconds=job["seconds"], starting=lambda name: say({"starting": name}))
        for result in results:
            say({"point": index, "result": _row(result)})
        say({"done": index})


def _memory_points(job: dict[str, Any], say: Say) -> None:
    """Peak growth of the resident set over one forward; the parent sets the allocator to give memory back at once."""
    for point in job["points"]:
        problem = _problem(point)
        for name in point["candidates"]:
            say({"starting": name})
            with contextlib.suppress(Missing):
                candidate = MAKERS[name](problem)
                few = LayerProblem(problem.case, 2, problem.dtype)
                few.runner(candidate)()
                growth = peak_memory_growth(problem.runner(candidate))
                scratch = None
                if name == "kron_kernels" and _backends.available()["cpu"].available:
                    scratch = _backends._introspect().last_scratch_bytes()
                output = problem.tokens * problem.case.shape[0] * problem.x.element_size()
                row = {"variant": name, "peak": growth, "output": output, "scratch": scratch}
                say({"point": point["index"], "result": row})
        say({"done": point["index"]})


def _problem(point: dict[str, Any]) -> LayerProblem:
    return LayerProblem(
        CASES[point["case"]], point["tokens"], DTYPES[point["dtype"]], point["backward"], point["copies"]
    )


def _row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variant": result.name,
        "status": result.status,
        "reason": result.reason,
        "error": result.error,
    }
    if result.timing is not None:
        row |= result.timing.columns("us")
    return row


if __name__ == "__main__":
    main()
