"""The child process of bench.model: times encoders at the points of a job, or measures the memory of their forward.

All points of a job have the dtype of the first. Messages are those of bench.worker.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from bench.encoder_candidates import COMPILED_DENSE, Models, make_way
from bench.protocol import Say, protocol
from bench.worker import make_all, result_row
from kron_kernels.convert.counting import count_parameters
from kron_kernels.testing import peak_memory_growth
from kron_kernels.testing.compare import Result, compare
from kron_kernels.testing.encoder import EncoderProblem, EncoderWay, forward, random_ids
from kron_kernels.testing.profile import profile_forward


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    {"time": time_points, "memory": memory_points, "profile": profile_points}[job["kind"]](job, say)


def time_points(job: dict[str, Any], say: Say) -> None:
    """Check and time the candidates of each point."""
    models = _models(job)
    for point in job["points"]:
        torch.compiler.reset()
        problem = EncoderProblem(random_ids(models.dense, point["batch"], point["sequence"]))
        makers = {name: functools.partial(make_way, name) for name in point["candidates"]}
        results, ways = make_all(makers, models, say)
        results += compare(
            problem,
            ways,
            seconds=job["seconds"],
            starting=lambda name: say({"starting": name}),
            over=[COMPILED_DENSE],
        )
        by_name = {way.name: way for way in ways}
        for result in results:
            say({"point": point["index"], "result": _row(result, by_name.get(result.name))})
        say({"done": point["index"]})


def memory_points(job: dict[str, Any], say: Say) -> None:
    """Peak growth of the resident set over one forward; the parent sets the allocator to give memory back at once."""
    models = _models(job)
    for point in job["points"]:
        ids = random_ids(models.dense, point["batch"], point["sequence"])
        for name in point["candidates"]:
            model = models.by_name[name]
            forward(model, ids[:, :2])
            # The hidden states that come back count too, as they do for a user.
            growth = peak_memory_growth(functools.partial(forward, model, ids))
            say({"point": point["index"], "result": {"variant": name, "peak": growth}})
        say({"done": point["index"]})


def profile_points(job: dict[str, Any], say: Say) -> None:
    """Where the time of each candidate goes at each point."""
    models = _models(job)
    for point in job["points"]:
        ids = random_ids(models.dense, point["batch"], point["sequence"])
        for name in point["candidates"]:
            say({"starting": name})
            found = profile_forward(models.by_name[name], ids, seconds=job["seconds"])
            say({"point": point["index"], "result": {"variant": name, "gap": found.gap, **asdict(found)}})
        say({"done": point["index"]})


def _models(job: dict[str, Any]) -> Models:
    first = job["points"][0]
    return Models(first["dtype"], {"num_hidden_layers": first["layers"], **job.get("sizes", {})}, job["presets"])


def _row(result: Result, way: EncoderWay | None) -> dict[str, Any]:
    row = result_row(result, "ms", {COMPILED_DENSE: "over_compiled"})
    if way is not None:
        row |= {"parameters": count_parameters(way.model), "tolerance": way.tolerance}
    return row


if __name__ == "__main__":
    main()
