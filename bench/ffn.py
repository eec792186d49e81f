"""Time BERT-base's feed-forward block, W1 - GELU - W2, in every way there is; results to bench/results/*.csv.

python -m bench.ffn                     all of it; killed and started again it goes on where it was
python -m bench.ffn --reach             only what a reach was set for: forward, hot weights
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch

from bench.ffn_candidates import COMPILED, FFN_MAKERS
from bench.harness import Budget, ResultFile, Row, add_run_options, stamp
from bench.points import COLD_COPIES, COLUMNS, POINT_KEY, Point, complete, measure, measure_memory, memory_file, missing
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress
from kron_kernels.testing.ffn import CASES

TOKENS = (1, 32, 128, 1024, 4096)
BACKWARD_TOKENS = (1024, 4096)
# At 4096 rows the activations are several times the weights: where those come from makes no difference.
COLD_TOKENS = (1, 32, 128, 1024)
MEMORY_CANDIDATES = ("dense", "matmul", "kron_matmul twice", "kron_kernels")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "ffn.csv", (*POINT_KEY, "variant"), COLUMNS)
    jobs = list(plan(arguments))
    progress = Progress(every_seconds=0)
    for done, (points, candidates) in enumerate(jobs):
        if budget.spent():
            sys.exit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        first = points[0].key()
        progress(done, len(jobs), " ".join(str(first[name]) for name in ("case", "direction", "dtype", "weights")))

        def store(point: Point, result: Row) -> None:
            file.add([{**complete(point, result), **current}])

        job = {"kind": "time", "threads": arguments.threads, "seconds": arguments.seconds}
        measure(missing(points, candidates, file, current), candidates, "bench.worker", job, store)
    memory = memory_file(arguments.out)
    for case, dtype in itertools.product(arguments.case, arguments.dtype):
        points = [Point(case, dtype, False, 1, count) for count in arguments.tokens if count >= 128]
        measure_memory(points, MEMORY_CANDIDATES, memory, {"threads": arguments.threads}, current)
    progress(len(jobs), len(jobs), f"done: {file.path}")


def plan(arguments: argparse.Namespace) -> Iterator[tuple[list[Point], tuple[str, ...]]]:
    """The jobs, each one child process: what has a reach comes first."""
    forward = [(dtype, False, 1) for dtype in arguments.dtype]
    training = [("fp32", True, 1)] if "fp32" in arguments.dtype else []
    cold = [(dtype, False, COLD_COPIES) for dtype in arguments.dtype]
    for dtype, backward, copies in forward if arguments.reach else [*forward, *training, *cold]:
        wanted = BACKWARD_TOKENS if backward else TOKENS if copies == 1 else COLD_TOKENS
        tokens = [count for count in arguments.tokens if count in wanted or (not backward and copies == 1)]
        with_compiled = arguments.compile and copies == 1
        names = tuple(name for name in FFN_MAKERS if with_compiled or name not in COMPILED)
        for case in arguments.case if tokens else ():
            yield [Point(case, dtype, backward, copies, count) for count in tokens], names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--reach", action="store_true", help="only what a reach was set for: forward, hot weights")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add_run_options(parser, seconds=0.2)
    parser.add_argument("--smoke", action="store_true", help="seconds: one case, few rows, short times")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(case=["k21-ffn"], tokens=[1, 128], seconds=0.03, reach=True, compile=False)
    return arguments


if __name__ == "__main__":
    main()
