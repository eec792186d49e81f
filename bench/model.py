"""Time a BERT-base-sized encoder, dense and compressed, on random weights: cost does not depend on the values.

python -m bench.model                      K8 and K21, batch 1 and 8, 128 tokens; results to model.csv
"""

from __future__ import annotations

import argparse
import itertools

import torch

from bench.harness import KEEP_MEMORY, RETURN_MEMORY, Budget, ResultFile, Row, add_run_options, child, stamp
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress

KEY = ("dtype", "batch", "sequence", "layers", "model")
COLUMNS = (
    *("parameters", "status", "error", "tolerance", "rounds", "calls"),
    *("time_ms_q10", "time_ms_q50", "time_ms_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
    *("forward_peak_mib",),
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "model.csv", KEY, COLUMNS)
    jobs = list(itertools.product(arguments.dtype, arguments.batch))
    progress = Progress(every_seconds=0)
    for done, (dtype, batch) in enumerate(jobs):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        progress(done, len(jobs), f"{dtype}, batch {batch} x {arguments.sequence}")
        point = {"dtype": dtype, "batch": batch, "sequence": arguments.sequence, "layers": arguments.layers}
        names = ["dense", *arguments.preset]
        if all(file.has({**point, "model": name}, current) for name in names):
            continue
        job = {**point, "presets": arguments.preset, "seconds": arguments.seconds, "threads": arguments.threads}
        rows = {row["model"]: row for row in child("bench.model_worker", {**job, "kind": "time"}, KEEP_MEMORY)}
        for row in child("bench.model_worker", {**job, "kind": "memory"}, RETURN_MEMORY):
            peak: Row = {"forward_peak_mib": None if row["peak"] is None else row["peak"] / 2**20}
            rows[row["model"]].update(peak)
        file.add({**point, **row, **current} for row in rows.values())
    progress(len(jobs), len(jobs), f"done: {file.path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["K8", "K21"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add_run_options(parser, seconds=3.0)
    parser.add_argument("--smoke", action="store_true", help="one layer, batch 1, float32, short times")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(layers=1, batch=[1], dtype=["fp32"], seconds=0.1)
    return arguments


if __name__ == "__main__":
    main()
