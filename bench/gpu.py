"""Everything that a GPU is needed for, in one command with a limit of time: build, prove, tune, measure, report.

python -m bench.gpu --minutes 30      killed or out of time, and started again, it goes on where it was
python -m bench.gpu --rehearse        the whole way on the CPU, interpreted, on tiny shapes, to a temporary folder

Results: bench/results/gpu-<device>.csv (one row a way and point), .json (what each step came to), .png.
No speed-up is written while a test, a sanitizer or a repeated call says that something is wrong: exit code 1 then, 3
where the time was too short for all of it, else 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gpu_candidates import BACKENDS, is_slow, makers_of
from bench.gpu_models import GRAPH, PRESETS
from bench.gpu_problems import EmbeddingProblem, Point, QkvProblem
from bench.gpu_report import choices, plot, write_choices
from bench.gpu_steps import PROOFS, STEPS, Outcome, Run, profiler
from bench.harness import KEEP_MEMORY, RESULTS, ResultFile, Row, read_rows, stamp
from bench.points import measure
from kron_kernels.backends import select
from kron_kernels.backends.devices import arch
from kron_kernels.backends.triton.problems import DTYPES
from kron_kernels.compress.files import write_text
from kron_kernels.testing.problem import TOLERANCE

# What matters most comes first: time may run out.
CASES = (
    *("k8-ffn", "k21-ffn", "k8-attention", "k21-attention", "k8-qkv", "k21-qkv", "balanced", "k8-w1", "k8-w2"),
    *("k21-w1", "k21-w2", "balanced-w1", "balanced-w2", "tq-w1", "tq-w2", "balanced-ffn", "balanced-qkv"),
    *("k8-embedding", "k21-embedding"),
)
TOKENS = (32768, 4096, 128)
KEY = ("case", "direction", "dtype", "tokens", "variant")
COLUMNS = (
    *("status", "reason", "error", "tolerance", "rounds", "time_us_q10", "time_us_q50", "time_us_q90"),
    *("speedup_q10", "speedup_q50", "speedup_q90", "wall_us", "launches", "peak_mib"),
    *("floor_us", "floor_share", "copy_gbs", "gemm_tflops", "gpu", "triton", "cuda"),
)


class Spent(Exception):
    """The time is over."""


@dataclass(frozen=True)
class ModelPoint:
    """A whole encoder at one batch; ``what`` is "encoder" or "train"."""

    what: str
    batch: int
    sequence: int
    dtype: str = "bf16"

    def key(self) -> Row:
        direction = "step" if self.what == "train" else "forward"
        return {
            "case": f"{self.what} {self.batch}x{self.sequence}",
            "direction": direction,
            "dtype": self.dtype,
            "tokens": self.batch * self.sequence,
        }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not arguments.rehearse and not torch.cuda.is_available():
        print("bench.gpu: error: torch finds no CUDA device; --rehearse runs without one", file=sys.stderr)
        return 2
    if arguments.rehearse and arguments.out == RESULTS:
        arguments.out = Path(tempfile.mkdtemp(prefix="kron-kernels-rehearsal-"))
    deadline = time.monotonic() + 60 * arguments.minutes
    run = Run(arguments.rehearse, arguments.out, device_name(arguments.rehearse), deadline, arguments.minutes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = Record(run)
    for name, step in STEPS.items():
        if name not in arguments.skip:
            record.step(name, step)
    wrong = [name for name in PROOFS if record.status(name) == "failed"]
    if "measure" not in arguments.skip:
        record.step("measure", lambda run: measure_all(run, record, wrong), again=True)
    if "profiler" not in arguments.skip:
        record.step("profiler", profiler)
    rows = read_rows(record.results.path)
    if not arguments.rehearse and not wrong:
        write_choices(select.CHOICES, choices(rows, arch(0)))
    plot(rows, run.out / f"gpu-{run.name}.png")
    print(f"results: {record.results.path}")
    statuses = {name: record.status(name) for name in (*STEPS, "measure") if name not in arguments.skip}
    if "failed" in statuses.values():
        return 1
    return 3 if "unfinished" in statuses.values() else 0


class Record:
    """What was found so far: rows in the CSV file, the outcome of each step in the JSON file."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.current = {
            **stamp(torch.get_num_threads()),
            "gpu": run.name,
            "triton": triton.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
        }
        self.results = ResultFile(run.out / f"gpu-{run.name}.csv", KEY, COLUMNS, machine=())
        self._path = run.out / f"gpu-{run.name}.json"
        self._steps: dict[str, Row] = json.loads(self._path.read_text())["steps"] if self._path.is_file() else {}

    def status(self, name: str) -> str:
        """Of a step, "" where it has not run on this commit."""
        step = self._steps.get(name, {})
        return str(step["status"]) if step.get("commit") == self.current["commit"] else ""

    def step(self, name: str, function: Callable[[Run], Outcome], again: bool = False) -> None:
        """Run a step and write what came of it; not where it was done on this commit, unless ``again``."""
        if self.status(name) in ("ok", "skipped") and not again:
            print(f"{name}: {self.status(name)}, as before", flush=True)
            return
        start = time.monotonic()
        outcome = function(self.run) if self.run.left() > 0 else Outcome("unfinished", "no time was left")
        self._steps[name] = {**outcome._asdict(), "seconds": time.monotonic() - start, "commit": self.current["commit"]}
        print(f"{name}: {outcome.status}, {time.monotonic() - start:.0f} s\n{outcome.detail}", flush=True)
        write_text(self._path, json.dumps({"machine": self.current, "steps": self._steps}, indent=1) + "\n")


def measure_all(run: Run, record: Record, wrong: Sequence[str]) -> Outcome:
    """Every point that lacks a result; without speed-ups where the steps ``wrong`` failed."""
    counts = {"ok": 0}

    def store(point: Point | ModelPoint, result: Row) -> None:
        result = {**point.key(), "tolerance": TOLERANCE[DTYPES[point.dtype]], **result}
        if wrong and result["status"] == "ok":
            figures = ("time_us", "speedup", "wall_us", "floor")
            result = {name: value for name, value in result.items() if not name.startswith(figures)}
            result |= {"status": "red", "reason": f"{', '.join(wrong)} failed"}
        record.results.add([{**result, **record.current}])
        ours = result["variant"] in BACKENDS or result["variant"].startswith(PRESETS)
        status = result["status"] if ours or result["status"] in ("ok", "red", "skipped") else "peers failed"
        counts[status] = counts.get(status, 0) + 1
        if run.left() <= 0:
            raise Spent

    try:
        for kind, points, names in plan(run.rehearse):
            left = [point for point in points if not _measured(record, point, names(point))]
            if left:
                print(f"  {kind}: {len(left)} points, {run.left():.0f} s left", flush=True)
                job = {**run.job, "kind": kind, "seconds": 0.1}
                # Whole models take an interpreter too long: a rehearsal runs them on the kernels of the CPU.
                environment = run.environment if kind == "time" else {}
                measure(left, names, "bench.gpu_worker", job, store, {**KEEP_MEMORY, **environment})
            if run.left() <= 0:
                raise Spent
    except Spent:
        return Outcome("unfinished", f"{counts}; start again to go on")
    failed = any(counts.get(status) for status in ("wrong", "crashed", "failed"))
    return Outcome("failed" if failed else "ok", str(counts))


def _measured(record: Record, point: Point | ModelPoint, names: Sequence[str]) -> bool:
    return all(record.results.has({**point.key(), "variant": name}, record.current) for name in names)


Names = Callable[[Any], Sequence[str]]


def plan(rehearse: bool) -> list[tuple[str, list[Any], Names]]:
    """Jobs in the order of what they are worth: kind, points, and the names of a point's candidates."""

    def quick(point: Point) -> list[str]:
        return [name for name in makers_of(point.kind) if not is_slow(name, point.kind)]

    def slow(point: Point) -> list[str]:
        return ["dense", *(name for name in makers_of(point.kind) if is_slow(name, point.kind))]

    def ways(point: ModelPoint) -> list[str]:
        names = ("dense", *PRESETS)
        graphs = [name + GRAPH for name in names] if point.what == "encoder" else []
        return [*names, *graphs]

    if rehearse:
        layers = [Point("k8-attention", 12, "fp32"), Point("tq-w1", 5, "fp32"), Point("k8-attention", 12, "fp32", True)]
        models = [ModelPoint("encoder", 1, 8, "fp32"), ModelPoint("train", 1, 8, "fp32")]
        return [
            ("time", layers, quick),
            ("encoder", models[:1], lambda point: ways(point)[:2]),
            ("train", models[1:], lambda point: ways(point)[:2]),
        ]
    jobs: list[tuple[str, list[Any], Names]] = []
    for tokens, backward in itertools.product(TOKENS, (False, True)):
        points = [Point(case, tokens, backward=backward) for case in CASES]
        if backward:
            points = [point for point in points if point.kind not in (QkvProblem, EmbeddingProblem)]
        jobs.append(("time", points, quick))
        if tokens == TOKENS[0] and backward:
            jobs.append(("encoder", [ModelPoint("encoder", 256, 128), ModelPoint("encoder", 1, 128)], ways))
            jobs.append(("train", [ModelPoint("train", 32, 128)], ways))
    for points in [points for kind, points, _ in jobs if kind == "time"]:
        # Dense again beside them, to compare with in the same rounds.
        jobs.append(("time", [point for point in points if len(slow(point)) > 1], slow))
    return jobs


def device_name(rehearse: bool) -> str:
    """Of the device, for names of files: "h200" of "NVIDIA H200"."""
    if rehearse:
        return "rehearsal"
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all of it (30)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, results to a temporary folder")
    parser.add_argument("--skip", nargs="+", choices=[*STEPS, "measure", "profiler"], default=[])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
