"""Where the time of an encoder goes, dense and compressed, by part; results to profile.csv.

python -m bench.profile     dense, K8 and K21 at the input shapes of the reach
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch

from bench.harness import KEEP_MEMORY, Budget, Crash, ResultFile, Row, add_run_options, child, stamp
from bench.model import REACH_SHAPES, EncoderPoint, shape
from bench.points import missing
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress

KEY = ("dtype", "batch", "sequence", "layers", "model", "part")
COLUMNS = ("time_ms", "share", "sum_ms", "traced_ms", "untraced_ms", "gap")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "profile.csv", KEY, COLUMNS)
    names = ["dense", *arguments.preset]
    progress = Progress(every_seconds=0)
    for done, dtype in enumerate(arguments.dtype):
        if budget.spent():
            sys.exit(f"the budget is spent after {done} of {len(arguments.dtype)} jobs; start again to go on")
        progress(done, len(arguments.dtype), f"{dtype}, {len(arguments.shape)} input shapes")
        every = [EncoderPoint(dtype, batch, sequence, arguments.layers) for batch, sequence in arguments.shape]
        points = missing(every, names, file, {**current, "part": "framework"}, "model")
        if not points:
            continue
        described = [{**asdict(point), "index": index, "candidates": names} for index, point in enumerate(points)]
        job = {"kind": "profile", "threads": arguments.threads, "seconds": arguments.seconds}
        job |= {"presets": arguments.preset, "sizes": arguments.sizes, "points": described}
        try:
            for message in child("bench.model_worker", job, KEEP_MEMORY):
                if "result" in message:
                    point = points[message["point"]]
                    file.add([{**point.key(), **row, **current} for row in part_rows(message["result"])])
        except Crash as crash:
            print(f"  {dtype}: {crash.starting}: {crash}", file=sys.stderr)
    progress(len(arguments.dtype), len(arguments.dtype), f"done: {file.path}")


def part_rows(result: Row) -> list[Row]:
    """A row for each part of one model's profile; times in milliseconds."""
    total = sum(result["parts"].values())
    return [
        {
            "model": result["variant"],
            "part": part,
            "time_ms": seconds * 1e3,
            "share": seconds / total,
            "sum_ms": total * 1e3,
            "traced_ms": result["traced"] * 1e3,
            "untraced_ms": result["untraced"] * 1e3,
            "gap": result["gap"],
        }
        for part, seconds in result["parts"].items()
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["K8", "K21"])
    parser.add_argument(
        "--shape", nargs="+", type=shape, default=list(REACH_SHAPES), help="batch x sequence (1x16 1x128 8x128)"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add_run_options(parser, seconds=2.0)
    parser.add_argument("--smoke", action="store_true", help="one layer, one shape, float32, short times")
    parser.set_defaults(sizes={})
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke: dict[str, Any] = {"layers": 1, "shape": [(1, 128)], "dtype": ["fp32"], "seconds": 0.2}
        vars(arguments).update(smoke)
    return arguments


if __name__ == "__main__":
    main()
