"""The child process of bench.distill_steps: checks and times all ways to do a step, or tells the memory of one.

Messages are those of bench.worker.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.distill_step_candidates import COMPILED, SIZES, STOCK, StepProblem, StepWay, Students, TrainStep
from bench.protocol import Say, protocol
from bench.worker import make_all, result_row
from kron_kernels.convert.counting import count_parameters
from kron_kernels.testing import peak_memory_growth
from kron_kernels.testing.compare import Result, compare

# Names of the columns of the speed-up over stock torch's layers.
OVER = {STOCK: "over_matmul", COMPILED: "over_compiled"}
# The optimiser makes its state in the first step: the second is as large as any after it.
MEMORY_STEPS = 3


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    {"time": time_points, "memory": memory_points}[job["kind"]](job, say)


def time_points(job: dict[str, Any], say: Say) -> None:
    """Check and time the candidates of each point."""
    for point in job["points"]:
        torch.compiler.reset()
        students = Students(SIZES[point["size"]], point["preset"])
        makers = {name: functools.partial(Students.way, name=name) for name in point["candidates"]}
        results, ways = make_all(makers, students, say)
        results += compare(
            StepProblem(students, sign_of_life=lambda: say({"starting": "timing"})),
            ways,
            seconds=job["seconds"],
            starting=lambda name: say({"starting": name}),
            over=list(OVER),
        )
        by_name = {way.name: way for way in ways}
        for result in results:
            say({"point": point["index"], "result": _row(result, by_name.get(result.name))})
        say({"done": point["index"]})


def memory_points(job: dict[str, Any], say: Say) -> None:
    """What steps add to the process at the peak once models and optimiser are there; a process for one candidate."""
    for point in job["points"]:
        size = SIZES[point["size"]]
        for name in point["candidates"]:
            say({"starting": name})
            # Thread stacks, code pages and libraries' buffers are there after this.
            Students(size.small(), point["preset"]).way(STOCK if name == COMPILED else name).step()
            way = Students(size, point["preset"]).way(name)
            if name == COMPILED:
                way.step.outcome()  # what the compiler takes is not what a step takes
            growth = peak_memory_growth(
                functools.partial(_several, way.step, lambda name=name: say({"starting": name}))
            )
            say({"point": point["index"], "result": {"variant": name, "peak": growth}})
        say({"done": point["index"]})


def _several(step: TrainStep, sign_of_life: Callable[[], None]) -> None:
    for _ in range(MEMORY_STEPS):
        step()
        sign_of_life()


def _row(result: Result, way: StepWay | None) -> dict[str, Any]:
    row = result_row(result, "ms", OVER)
    if way is not None:
        row["parameters"] = count_parameters(way.step.student)
    return row


if __name__ == "__main__":
    main()
