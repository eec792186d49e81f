"""The child process of bench.integrations.lokr: checks and times all ways of a point, or tells the memory of one.

Messages are those of bench.worker.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.integrations.lokr_ways import BASE, PEFT, LokrCase, LokrProblem
from bench.protocol import Say, protocol
from bench.worker import make_all, result_row
from kron_kernels.cli.bench import DTYPES
from kron_kernels.testing import peak_memory_growth
from kron_kernels.testing.compare import compare

# Names of the columns of the speed-up over these.
OVER = {PEFT: "over_peft", BASE: "over_base"}
_FEW_TOKENS = 2
_SIGN_SECONDS = 10.0


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    {"time": time_points, "memory": memory_points}[job["kind"]](job, say)


def time_points(job: dict[str, Any], say: Say) -> None:
    """Check and time the candidates of each point."""
    for point in job["points"]:
        problem = _problem(point, _now_and_then(lambda: say({"starting": "timing"})))
        results, ways = make_all(_makers(point), problem, say)
        results += compare(
            problem, ways, seconds=job["seconds"], starting=lambda name: say({"starting": name}), over=list(OVER)
        )
        for result in results:
            say({"point": point["index"], "result": result_row(result, "ms", OVER)})
        say({"done": point["index"]})


def memory_points(job: dict[str, Any], say: Say) -> None:
    """What one call adds to the process at the peak, its results included; a process for one candidate."""
    for point in job["points"]:
        for name in point["candidates"]:
            say({"starting": name})
            few, problem = _problem({**point, "tokens": _FEW_TOKENS}), _problem(point)
            # Thread stacks, code pages and libraries' buffers are there after this.
            few.runner(few.way(name))()
            run = problem.runner(problem.way(name))
            del few
            say({"point": point["index"], "result": {"variant": name, "peak": peak_memory_growth(run)}})
        say({"done": point["index"]})


def _now_and_then(action: Callable[[], None]) -> Callable[[], None]:
    """``action``, at most once in ``_SIGN_SECONDS``: the rounds of a large layer may last longer than a child may be
    silent, and a message at each call would count as part of a small one."""
    last = time.monotonic()

    def act() -> None:
        nonlocal last
        if time.monotonic() - last > _SIGN_SECONDS:
            last = time.monotonic()
            action()

    return act


def _problem(point: dict[str, Any], sign_of_life: Callable[[], None] = lambda: None) -> LokrProblem:
    case = LokrCase(point["n"], point["m"], point["rank"])
    return LokrProblem(case, point["tokens"], DTYPES[point["dtype"]], point["backward"], point["part"], sign_of_life)


def _makers(point: dict[str, Any]) -> dict[str, Any]:
    return {name: functools.partial(LokrProblem.way, name=name) for name in point["candidates"]}


if __name__ == "__main__":
    main()
