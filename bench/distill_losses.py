"""Peak memory and time of the attention terms of distillation, ours and from whole scores; to distill-losses.csv.

python -m bench.distill_losses     12 layers of 12 heads, 8 sequences of 128 and of 512 tokens, float32

The plain way is what eager attention leaves: scores of all layers of student and teacher, held at once, and torch's
loss of them. Both go forward and backward to the student's queries and keys. ``memory_mib`` is the growth of the
resident set at its peak in a fresh process, the gradients included; ``error`` and ``gradient_error`` are relative
ones against float64, checked before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools

from bench.harness import (
    KEEP_MEMORY,
    RETURN_MEMORY,
    Budget,
    Crash,
    ResultFile,
    Row,
    add_run_options,
    child,
    stamp,
)
from kron_kernels.cli.output import Progress

SHAPE = ("term", "layers", "batch", "heads", "length", "head_size")
KEY = (*SHAPE, "way")
COLUMNS = (
    *("status", "reason", "memory_mib", "error", "gradient_error"),
    *("rounds", "calls", "time_ms_q10", "time_ms_q50", "time_ms_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
)
TERMS, WAYS = ("mse", "kl"), ("plain", "ours")
WORKER = "bench.distill_worker"


def main() -> None:
    arguments = parse()
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "distill-losses.csv", KEY, COLUMNS)
    jobs = list(itertools.product(arguments.term, arguments.length))
    progress = Progress(every_seconds=0)
    for done, (term, length) in enumerate(jobs):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        progress(done, len(jobs), f"{term}, {arguments.batch} x {length}")
        sizes = (term, arguments.layers, arguments.batch, arguments.heads, length, arguments.head_size)
        shape: Row = dict(zip(SHAPE, sizes, strict=True))
        if not all(file.has({**shape, "way": way}, current) for way in WAYS):
            file.add([{**shape, **row, **current} for row in measure(shape, arguments.threads, arguments.seconds)])
    progress(len(jobs), len(jobs), f"done: {file.path}")


def measure(shape: Row, threads: int, seconds: float) -> list[Row]:
    """A row for each way: timed in turn in one process, then the memory of each in a process of its own."""
    job = {**shape, "threads": threads, "seconds": seconds}
    try:
        rows = list(child(WORKER, {**job, "kind": "time"}, KEEP_MEMORY))
    except Crash as crash:
        rows = [{"way": way, "status": "crashed", "reason": str(crash)} for way in WAYS]
    for row in rows:
        if row["status"] != "ok":
            continue
        try:
            (found,) = child(WORKER, {**job, "kind": "memory", "way": row["way"]}, RETURN_MEMORY)
            row.update(found)
        except Crash as crash:
            row.update(status="crashed", reason=str(crash))
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--term", nargs="+", choices=TERMS, default=list(TERMS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--length", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--head-size", type=int, default=64)
    add_run_options(parser, seconds=10)
    parser.add_argument("--smoke", action="store_true", help="two layers of two small heads, little time")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(layers=2, batch=2, heads=2, head_size=16, length=[96], seconds=0.05)
    return arguments


if __name__ == "__main__":
    main()
