"""The child process that measures for every suite: a crash, a foreign thread pool or a leak stays in it.

Reads a job as JSON from its argument and writes one JSON object a line to stdout: ``{"starting": name}`` before a
candidate first runs, ``{"index": i, "result": {...}}`` for each result, ``{"done": i}`` after each point, and
``{"bytes": n}`` for a memory job.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from bench.suites import Missing, Point
from kron_kernels.testing.timing import Result, compare, first_line

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    name = job["suite"]
    suite = importlib.import_module(name if "." in name else f"bench.suites.{name}")
    kinds = {"time": time_points, "memory": memory_points}
    if job["kind"] in kinds:
        kinds[job["kind"]](suite, job, say)
    else:  # a kind of the suite's own
        getattr(suite, job["kind"])(job, say)


def protocol() -> Say:
    """Return a function that writes one message; whatever libraries print goes to stderr from here on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return say


def time_points(suite: ModuleType, job: dict[str, Any], say: Say) -> None:
    """Check every candidate of each point, then time those that are right, in turns."""
    for described in job["points"]:
        problem = suite.problem(Point(**described["point"]))
        problem.sign_of_life = lambda: say({"alive": True})
        candidates, results = {}, []
        for name in described["candidates"]:
            say({"starting": name})
            try:
                candidates[name] = suite.candidate(problem, name)
            except Missing as reason:
                results.append(Result(name, "skipped", str(reason)))
            except Exception as failure:  # a peer may raise anything
                results.append(Result(name, "failed", first_line(failure)))
        beside = suite.beside(problem) if hasattr(suite, "beside") else ()
        results += compare(
            problem,
            list(candidates.values()),
            seconds=job["seconds"],
            starting=lambda name: say({"starting": name}),
            beside=beside,
            attempts=1 if job["quick"] else 3,
            **(suite.options() if hasattr(suite, "options") else {}),
        )
        timings = {result.name: result.timing for result in results}
        for result in results:
            if result.name in candidates:
                row = result_row(result) | {"tolerance": problem.tolerance(candidates[result.name])}
                row |= suite.columns(problem, candidates[result.name], timings)
            elif result.name in described["candidates"]:
                row = result_row(result)
            else:
                continue
            say({"index": described["index"], "result": row})
        say({"done": described["index"]})


def memory_points(suite: ModuleType, job: dict[str, Any], say: Say) -> None:
    """Tell the peak growth of the resident set for one candidate; the parent makes the allocator return memory."""
    for described in job["points"]:
        for name in described["candidates"]:
            say({"starting": name})
            say({"bytes": suite.memory(Point(**described["point"]), name)})


def result_row(result: Result) -> dict[str, Any]:
    """Return a result in columns."""
    row = {"variant": result.name, "status": result.status, "reason": result.reason, "error": result.error}
    return row | (result.timing.columns("us") if result.timing else {})


if __name__ == "__main__":
    main()
    # Thread pools of peers and a spoilt CUDA context must not be torn down by Python.
    sys.stdout.flush()
    os._exit(0)
