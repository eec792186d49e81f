"""Time single BERT-base layers in every way there is, each checked first; results to bench/results/*.csv.

python -m bench.layers                     all of it; killed and started again it goes on where it was
python -m bench.layers --case balanced --tokens 128 --budget 5
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from bench.candidates import ALONE, MAIN, Missing, fastkron
from bench.harness import KEEP_MEMORY, RETURN_MEMORY, Budget, Crash, ResultFile, Row, add_run_options, child, stamp
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress
from kron_kernels.timing.layers import CASES, TOLERANCE, LayerProblem

TOKENS = (1, 32, 128, 1024, 4096)
# Training runs on whole batches: small row counts are timed forward only.
BACKWARD_TOKENS = (128, 1024, 4096)
COLD_COPIES = 12
POINT_KEY = ("case", "direction", "dtype", "tokens", "weights")
COLUMNS = (
    *("factors", "macs", "saving", "status", "reason", "error", "tolerance", "rounds", "calls"),
    *("time_us_q10", "time_us_q50", "time_us_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
    *("gflops", "peak_gflops", "peak_share"),
)
MEMORY_CANDIDATES = ("dense", "torch.kron + linear", "matmul B first", "matmul A first", "LyCORIS", "kron_kernels")


@dataclass(frozen=True)
class Point:
    """One measurement: everything but the candidate."""

    case: str
    dtype: str
    backward: bool
    copies: int
    tokens: int

    def key(self) -> Row:
        return {
            "case": self.case,
            "direction": "forward+backward" if self.backward else "forward",
            "dtype": self.dtype,
            "tokens": self.tokens,
            "weights": "hot" if self.copies == 1 else "cold",
        }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    peaks = measure_peaks(arguments.threads)
    print("square matrix products reach", ", ".join(f"{value:.0f} GFLOP/s in {name}" for name, value in peaks.items()))
    layers = ResultFile(arguments.out / "layers.csv", (*POINT_KEY, "variant"), COLUMNS)
    jobs = list(plan(arguments))
    progress = Progress(every_seconds=0)
    for done, (points, candidates) in enumerate(jobs):
        if budget.spent():
            sys.exit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        first = points[0].key()
        progress(done, len(jobs), " ".join(str(first[name]) for name in ("case", "direction", "dtype", "weights")))
        missing = [
            point
            for point in points
            if not all(layers.has({**point.key(), "variant": name}, current) for name in candidates)
        ]
        if candidates == ALONE and (reason := fastkron_missing(points[0])):
            skipped = {"variant": "FastKron", "status": "skipped", "reason": reason}
            layers.add([{**complete(point, skipped, peaks), **current} for point in missing])
        else:
            time_points(missing, candidates, arguments, layers, current, peaks)
    measure_memory(arguments, current)
    progress(len(jobs), len(jobs), f"done: {layers.path}")


def measure_peaks(threads: int) -> dict[str, float]:
    """Best rate of a square matrix product by dtype, GFLOP/s."""
    rows = child("bench.worker", {"kind": "peak", "threads": threads}, KEEP_MEMORY)
    peaks = {row["dtype"]: row["gflops"] for row in rows}
    # Without matrix units for it, bfloat16 is best multiplied in float32: the peak is then that of float32.
    peaks["bf16"] = max(peaks.values())
    return peaks


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
    points: list[Point],
    candidates: tuple[str, ...],
    arguments: argparse.Namespace,
    layers: ResultFile,
    current: Row,
    peaks: dict[str, float],
) -> None:
    """Measure the points in child processes; after a crash a new one goes on without the candidate that died."""
    left = {index: list(candidates) for index in range(len(points))}
    while left:
        job = {
            "kind": "time",
            "threads": arguments.threads,
            "seconds": arguments.seconds,
            "points": [{**asdict(points[index]), "index": index, "candidates": names} for index, names in left.items()],
        }
        try:
            for message in child("bench.worker", job, KEEP_MEMORY):
                if "result" in message:
                    point = points[message["point"]]
                    # The second process repeats dense and ours only to have something to compare with.
                    if candidates != ALONE or message["result"]["variant"] == "FastKron":
                        layers.add([{**complete(point, message["result"], peaks), **current}])
                elif "done" in message:
                    del left[message["done"]]
        except Crash as crash:
            index = min(left)
            print(f"  {crash.starting}: {crash}", file=sys.stderr)
            died = {"variant": crash.starting, "status": "crashed", "reason": str(crash)}
            if crash.starting in left[index]:
                left[index].remove(crash.starting)
                layers.add([{**complete(points[index], died, peaks), **current}])
            if crash.starting not in candidates or crash.starting == "dense":
                rest = [{**died, "variant": name} for name in left.pop(index)]
                layers.add([{**complete(points[index], row, peaks), **current} for row in rest])


def fastkron_missing(point: Point) -> str:
    """Why FastKron cannot compute the point's case, "" where it can: no process need start to find out."""
    try:
        fastkron(LayerProblem(CASES[point.case], 1, DTYPES[point.dtype], point.backward))
    except Missing as reason:
        return str(reason)
    return ""


def complete(point: Point, result: Row, peaks: dict[str, float]) -> Row:
    """A result with its key, and with the rate it comes to."""
    case = CASES[point.case]
    row = {
        **point.key(),
        "factors": str(case),
        "macs": case.macs,
        "saving": case.saving,
        "tolerance": TOLERANCE[DTYPES[point.dtype]],
        **result,
    }
    if "time_us_q50" in result:
        m, n = case.shape
        dense = row["variant"].startswith("dense") or row["variant"] in ("torch.kron + linear", "PEFT")
        # Forward and backward do the forward's work three times: y, dx, and the gradients of the weights.
        flop = 2 * point.tokens * (m * n if dense else case.macs) * (3 if point.backward else 1)
        row["gflops"] = flop / result["time_us_q50"] / 1e3
        row["peak_gflops"] = peaks[point.dtype]
        row["peak_share"] = row["gflops"] / row["peak_gflops"]
    return row


def measure_memory(arguments: argparse.Namespace, current: Row) -> None:
    """Peak memory of forward beyond the output, to memory.csv."""
    columns = ("output_mib", "peak_mib", "extra_mib", "scratch_mib")
    memory = ResultFile(arguments.out / "memory.csv", ("case", "dtype", "tokens", "variant"), columns)
    for case, dtype in itertools.product(arguments.case, arguments.dtype):
        points = [Point(case, dtype, False, 1, count) for count in arguments.tokens if count >= 128]
        missing = [point for point in points if not memory.has({**point.key(), "variant": "kron_kernels"}, current)]
        if not missing:
            continue
        described = [
            {**asdict(point), "index": index, "candidates": MEMORY_CANDIDATES} for index, point in enumerate(missing)
        ]
        job = {"kind": "memory", "threads": arguments.threads, "points": described}
        try:
            for message in child("bench.worker", job, RETURN_MEMORY):
                if "result" in message:
                    key = missing[message["point"]].key()
                    memory.add([{**key, **mebibytes(message["result"]), **current}])
        except Crash as crash:
            print(f"  memory of {case} {dtype}, {crash.starting}: {crash}", file=sys.stderr)


def mebibytes(result: Row) -> Row:
    """The worker's bytes as MiB; ``extra`` is the peak beyond the output."""
    peak, output, scratch = result["peak"], result["output"], result["scratch"]
    return {
        "variant": result["variant"],
        "output_mib": output / 2**20,
        "peak_mib": None if peak is None else peak / 2**20,
        "extra_mib": None if peak is None else max(0, peak - output) / 2**20,
        "scratch_mib": None if scratch is None else scratch / 2**20,
    }


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
