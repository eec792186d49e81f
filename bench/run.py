"""Measure a suite: ``python -m bench.run layers`` (or ffn, encoder, distill, adapters, gpu, all).

Every candidate is checked against float64 first; a wrong one gets no figure. Rows go to OUT/SUITE.csv as they come:
killed and started again, a run goes on where it was. ``python -m bench.report`` makes docs/results of them.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.harness import RESULTS, ResultFile, Run, stamp
from bench.suites import NAMES, Point


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 where a candidate of ours is wrong, 3 where the time was over before all was measured."""
    arguments = parse(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    names = [name for name in NAMES if name != "gpu"] if arguments.suite == "all" else [arguments.suite]
    return max(measure(name, arguments, deadline) for name in names)


def measure(name: str, arguments: argparse.Namespace, deadline: float) -> int:
    """Measure one suite."""
    suite = importlib.import_module(f"bench.suites.{name}")
    if hasattr(suite, "main"):
        return int(suite.main(arguments, deadline))
    file = ResultFile(arguments.out / f"{name}.csv", suite.COLUMNS)
    seconds = arguments.seconds or (suite.SECONDS / 20 if arguments.quick else suite.SECONDS)
    current = stamp(arguments.threads)
    run = Run(name, suite, file, current, arguments.threads, seconds, deadline, arguments.quick)
    points = select(suite.points(arguments.quick), arguments.only)
    print(f"{name}: {len(points)} points, {current['machine']}, commit {current['commit']}", file=sys.stderr)
    complete = run.points(points)
    print(f"{name}: {'done' if complete else 'the time is over; start again to go on'}: {file.path}", file=sys.stderr)
    return 0 if complete else 3


def select(points: Sequence[Point], pattern: str) -> list[Point]:
    """Return the points whose fields, joined by spaces, the pattern is found in ("k8.* fp32 128 hot")."""
    found = [point for point in points if re.search(pattern, " ".join(asdict(point).values()))]
    if not found:
        raise SystemExit(f"--only: expected a pattern of one of the {len(points)} points, got {pattern!r}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=[*NAMES, "all"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and times: does it work? Figures mean nothing")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression over a point's fields")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time for all of it (no limit)")
    parser.add_argument("--seconds", type=float, help="time for each candidate at each point (the suite's own)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder of the CSV files (bench/results; with --quick build/bench)")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or (Path("build/bench") if arguments.quick else RESULTS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
