"""Time single BERT-base layers in every way there is, each checked first; results to bench/results/*.csv.

python -m bench.layers                     all of it; killed and started again it goes on where it was
python -m bench.layers --case balanced --tokens 128 --budget 5
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch

from bench.candidates import ALONE, MAIN, Missing, fastkron
from bench.harness import Budget, ResultFile, Row, add_run_options, stamp
from bench.points import COLD_COPIES, COLUMNS, POINT_KEY, Point, complete, measure, measure_memory, memory_file, missing
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress
from kron_kernels.testing.layers import CASES, LayerProblem

TOKENS = (1, 32, 128, 1024, 4096)
# Training runs on whole batches: small row counts are timed forward only.
BACKWARD_TOKENS = (128, 1024, 4096)
MEMORY_CANDIDATES = ("dense", "torch.kron + linear", "matmul B first", "matmul A first", "LyCORIS", "kron_kernels")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    layers = ResultFile(arguments.out / "layers.csv", (*POINT_KEY, "variant"), COLUMNS)
    jobs = list(plan(arguments))
    progress = Progress(every_seconds=0)
    for done, (points, candidates) in enumerate(jobs):
        if budget.spent():
            sys.exit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        first = points[0].key()
        progress(done, len(jobs), " ".join(str(first[name]) for name in ("case", "direction", "dtype", "weights")))
        left = missing(points, candidates, layers, current)
        if candidates == ALONE and (reason := fastkron_missing(points[0])):
            skipped = {"variant": "FastKron", "status": "skipped", "reason": reason}
            layers.add([{**complete(point, skipped), **current} for point in left])
        else:
            time_points(left, candidates, arguments, layers, current)
    memory = memory_file(arguments.out)
    for case, dtype in itertools.product(arguments.case, arguments.dtype):
        points = [Point(case, dtype, False, 1, count) for count in arguments.tokens if count >= 128]
        measure_memory(points, MEMORY_CANDIDATES, memory, {"threads": arguments.threads}, current)
    progress(len(jobs), len(jobs), f"done: {layers.path}")


def plan(arguments: argparse.Namespace) -> Iterator[tuple[list[Point], tuple[str, ...]]]:
    """The jobs, each one child process: what has a target comes first."""
    weights = [1] if arguments.weights == "hot" else [1, COLD_COPIES]
    for copies, dtype, backward in itertools.product(weights, arguments.dtype, (False, True)):
        if (backward and arguments.forward_only) or (backward and copies > 1):
            continue
        for case in arguments.case:
            tokens = [count for count in arguments.tokens if not backward or count in BACKWARD_TOKENS]
            points = [Point(case, dtype, backward, copies, count) for count in tokens]
            if points:
                # Compiling takes longer than all the timing: cold weights do without.
                with_compiled = arguments.compile and copies == 1
                names = tuple(name for name in MAIN if with_compiled or name != "matmul, compiled")
                yield points, names
                if copies == 1:
                    yield points, ALONE


def time_points(
    points: list[Point], candidates: tuple[str, ...], arguments: argparse.Namespace, layers: ResultFile, current: Row
) -> None:
    """Measure the points and put what comes into the file."""

    def store(point: Point, result: Row) -> None:
        # The second process repeats dense and ours only to have something to compare with.
        if candidates != ALONE or result["variant"] == "FastKron":
            layers.add([{**complete(point, result), **current}])

    job = {"kind": "time", "threads": arguments.threads, "seconds": arguments.seconds}
    measure(points, candidates, "bench.worker", job, store)


def fastkron_missing(point: Point) -> str:
    """Why FastKron cannot compute the point's case, "" where it can: no process need start to find out."""
    try:
        fastkron(LayerProblem(CASES[point.case], 1, DTYPES[point.dtype], point.backward))
    except Missing as reason:
        return str(reason)
    return ""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--weights", choices=("hot", "both"), default="both", help="both: also 12 layers in rotation")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add_run_options(parser, seconds=0.3)
    parser.add_argument("--smoke", action="store_true", help="a minute's worth: two cases, few rows, short times")
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke = {"case": ["balanced", "k21-attention"], "tokens": [1, 128], "seconds": 0.03, "weights": "hot"}
        vars(arguments).update(smoke, compile=False)
    return arguments


if __name__ == "__main__":
    main()
