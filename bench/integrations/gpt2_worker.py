"""The child process of bench.integrations.gpt2; messages are those of bench.worker."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch

from bench.integrations.gpt2_ways import A_FIRST, B_FIRST, CASES, TermsProblem, TextProblem, layer_way
from bench.protocol import protocol
from bench.worker import make_all, result_row
from kron_kernels.testing.compare import compare

# Names of the columns of the speed-up over the einsum forms.
OVER = {B_FIRST: "over_b_first", A_FIRST: "over_a_first"}


def main() -> None:
    job = json.loads(sys.argv[1])
    say = protocol()
    torch.set_num_threads(job["threads"])
    for point in job["points"]:
        problem: Any
        if point["case"] in CASES:
            problem = TermsProblem(CASES[point["case"]], point["tokens"], point["backward"])
            makers = {name: functools.partial(layer_way, name=name) for name in point["candidates"]}
        else:
            problem = TextProblem(point["prompt"], point["tokens"], **job["sizes"])
            makers = {name: functools.partial(TextProblem.way, name=name) for name in point["candidates"]}
        results, ways = make_all(makers, problem, say)
        results += compare(
            problem, ways, seconds=job["seconds"], starting=lambda name: say({"starting": name}), over=list(OVER)
        )
        for result in results:
            say({"point": point["index"], "result": result_row(result, "ms", OVER)})
        say({"done": point["index"]})


if __name__ == "__main__":
    main()
