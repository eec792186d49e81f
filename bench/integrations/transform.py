"""Time online transforms with int8 results, as FlatQuant has them; results to bench/results/integrations-transform.csv.

python -m bench.integrations.transform     all of it, some minutes; killed and started again it goes on where it was

A square pair turns the activations of a layer before they are quantised by token. Ways: two matmuls and torch's own
operations, eagerly and by torch.compile; ``kron_matmul`` with the same operations; ``kron_matmul_int8``.
"""

from __future__ import annotations

import argparse
import itertools

from bench.harness import KEEP_MEMORY, Budget, Crash, ResultFile, Row, add_run_options, child, stamp
from bench.integrations.transform_worker import WAYS
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress

# Widths of Llama-2-7B and Qwen2.5-7B, and of BERT-base: sizes of the left and of the right factor.
CASES = {"4096": (64, 64), "3584": (56, 64), "768": (24, 32)}
TOKENS = (1, 128, 1024)
KEY = ("case", "dtype", "tokens", "way")
COLUMNS = (
    *("left", "right", "status", "reason", "error", "rounds", "calls"),
    *("time_us_q10", "time_us_q50", "time_us_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
)
WORKER = "bench.integrations.transform_worker"


def main() -> None:
    arguments = parse()
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "integrations-transform.csv", KEY, COLUMNS)
    ways = [name for name in WAYS if arguments.compile or "compiled" not in name]
    jobs = list(itertools.product(arguments.case, arguments.dtype, arguments.tokens))
    progress = Progress(every_seconds=0)
    for done, (case, dtype, tokens) in enumerate(jobs):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        progress(done, len(jobs), f"{case}, {dtype}, {tokens} tokens")
        point: Row = {"case": case, "dtype": dtype, "tokens": tokens}
        if all(file.has({**point, "way": way}, current) for way in ways):
            continue
        left, right = CASES[case]
        shape = {"left": left, "right": right}
        job = {**point, **shape, **{name: getattr(arguments, name) for name in ("threads", "seconds", "compile")}}
        file.add([{**point, **shape, **row, **current} for row in measure(job, ways)])
    progress(len(jobs), len(jobs), f"done: {file.path}")


def measure(job: Row, ways: list[str]) -> list[Row]:
    """A row for each way, from a process of its own."""
    try:
        return list(child(WORKER, job, KEEP_MEMORY))
    except Crash as crash:
        return [{"way": way, "status": "crashed", "reason": str(crash)} for way in ways]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add_run_options(parser, seconds=0.5)
    parser.add_argument("--smoke", action="store_true", help="seconds: one small case, without torch.compile")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(case=["768"], tokens=[1, 17], seconds=0.02, compile=False)
    return arguments


if __name__ == "__main__":
    main()
