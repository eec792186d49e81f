"""The steps of bench.gpu that prove and prepare: build, tests, sanitizer, repeats, tuning, a profiler's summary.

Each is a function of the run that gives an :class:`Outcome`. "failed" means wrong results or broken tools; "skipped"
that the machine lacks what the step needs; "unfinished" that the time ran out.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_candidates import BACKENDS
from bench.gpu_problems import Point
from bench.harness import ROOT, Row
from bench.points import measure
from kron_kernels import backends

# What a rehearsal changes in the environment of every child.
REHEARSAL = {"TRITON_INTERPRET": "1", "KRON_KERNELS_BACKEND": "triton", "KRON_KERNELS_GPU_TESTS": "cpu"}
_METRICS = (
    *("gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    *("sm__throughput.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread"),
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
_LAST_LINES = 12
_MOST_SHARDS = 8


class Outcome(NamedTuple):
    """ "ok", "failed", "skipped" or "unfinished", and what to say about it."""

    status: str
    detail: str


@dataclass
class Run:
    """What the steps need to know. ``deadline``: of ``time.monotonic()``."""

    rehearse: bool
    out: Path
    name: str
    deadline: float
    minutes: float

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def environment(self) -> dict[str, str]:
        return dict(REHEARSAL) if self.rehearse else {}

    @property
    def job(self) -> Row:
        return {"device": self.device, "rehearse": self.rehearse}

    def left(self, share: float = 1.0) -> float:
        """Seconds until the deadline, at most a share of the whole run."""
        return max(0.0, min(self.deadline - time.monotonic(), 60 * self.minutes * share))


def build(run: Run) -> Outcome:
    """Build the extension where CUDA kernels are missing and a compiler is there; say which backends there are."""
    missing = "cuda" in BACKENDS and not backends.available()["cuda"].available
    if missing and not run.rehearse and shutil.which("nvcc") and os.environ.get("KRON_KERNELS_NO_BUILD") != "1":
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        done = _command(command, run.left(0.4), {"KRON_KERNELS_REQUIRE_EXT": "1"})
        if done.status != "ok":
            return done
    code = (
        "import json; from kron_kernels import _backends;"
        "print(json.dumps({name: f'{s.available}: {s.reason}' for name, s in backends.available().items()}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        return Outcome("failed", _tail(found.stderr))
    statuses = json.loads(found.stdout.splitlines()[-1])
    return Outcome("ok", "; ".join(f"{name}: {status}" for name, status in statuses.items()))


def tests(run: Run) -> Outcome:
    """The GPU tests, in several processes: compiling takes most of their time. A rehearsal interprets a few of them."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome("skipped", "pytest is not installed")
    # Without the options of the project, which ask for plugins.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
    ]
    shards = 1 if run.rehearse else max(1, min(_MOST_SHARDS, (os.cpu_count() or 1) // 2))
    seconds = run.left(0.3)
    with ThreadPoolExecutor(shards) as pool:
        outcomes = pool.map(
            lambda shard: _command(
                command, seconds, {**run.environment, "KRON_KERNELS_GPU_TESTS_SHARD": f"{shard}/{shards}"}
            ),
            range(shards),
        )
        return worst(list(outcomes))


def repeats(run: Run) -> Outcome:
    """Races show as results that differ: each way of ours many times, in two processes."""
    points = [Point("k8-attention", 12, "fp32", True)]
    if not run.rehearse:
        cases = ("k8-attention", "k8-w1", "k21-w2", "balanced", "k8-ffn", "k21-ffn")
        points = [Point(case, 1000, backward=True) for case in cases]
        points += [Point(case, 1000) for case in ("k8-qkv", "k21-qkv", "k8-embedding")]
    job = {**run.job, "kind": "repeat", "times": 2 if run.rehearse else 1000}
    return compare_digests([_all(points, job, run), _all(points, {**job, "times": 1}, run)])


def compare_digests(processes: list[list[tuple[Point, Row]]]) -> Outcome:
    """What repeats found: no call differed from the first, and both processes computed the same."""
    faults, digests = [], {}
    for number, found in enumerate(processes):
        for point, row in found:
            what = f"{point.case} {row['variant']}"
            if row.get("status") == "crashed":
                faults.append(f"{what}: {row['reason']}")
                continue
            if row["differing"]:
                faults.append(f"{what}: {row['differing']} of {row['times']} results differ from the first")
            before = digests.setdefault((point, row["variant"]), row["digest"])
            if before != row["digest"]:
                faults.append(f"{what}: process {number + 1} computes something else than the first")
    if faults:
        return Outcome("failed", "; ".join(faults))
    return (
        Outcome("ok", f"{len(digests)} ways, equal results") if digests else Outcome("skipped", "no way of ours runs")
    )


def sanitizer(run: Run) -> Outcome:
    """compute-sanitizer over every kernel on small shapes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not run.rehearse:
        return Outcome("skipped", "compute-sanitizer is not there")
    cases = ("k8-attention",) if run.rehearse else ("k8-attention", "k8-w1", "k8-w2", "k21-attention", "balanced")
    points = [Point(case, 70 if not run.rehearse else 12, "fp32" if run.rehearse else "bf16", True) for case in cases]
    if not run.rehearse:
        points += [Point("k8-ffn", 70, backward=True), Point("k8-qkv", 70), Point("k8-embedding", 70)]
    job = {**run.job, "kind": "small", "points": _described(points)}
    outcomes = []
    for name in ("memcheck",) if run.rehearse else ("memcheck", "racecheck"):
        # Without torch's cache every tensor is an allocation, whose bounds the tool then knows.
        prefix = [] if tool is None else [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
        command = [*prefix, sys.executable, "-m", "bench.gpu_worker", json.dumps(job)]
        done = _command(command, run.left(0.15), {**run.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        outcomes.append(Outcome(done.status, f"{name}: {done.detail}"))
    return worst(outcomes)


def tune(run: Run) -> Outcome:
    """Tiles for the shapes that are measured."""
    if run.rehearse:
        return Outcome("skipped", "an interpreter has no tiles to tune")
    seconds = run.left(0.25)
    command = [sys.executable, "-m", "kron_kernels.backends.triton.tune", "--minutes", f"{seconds / 60 - 0.5:.2f}"]
    return _command(command, seconds, {}, unfinished=3)


def profiler(run: Run) -> Outcome:
    """Nsight Compute on the three main kernels: bandwidth, tensor cores, occupancy; to gpu-<device>-ncu.csv."""
    tool = shutil.which("ncu")
    if tool is None:
        return Outcome("skipped", "ncu is not there")
    lines: list[Row] = []
    for case in ("k8-attention", "k8-ffn", "k21-qkv"):
        job = {**run.job, "kind": "once", "points": _described([Point(case, 32768)], ["kron_kernels"])}
        command = [tool, "--csv", "--metrics", ",".join(_METRICS), "--kernel-name", "regex:mm|ffn|chain|qkv|kron"]
        command += [sys.executable, "-m", "bench.gpu_worker", json.dumps(job)]
        done = _run(command, run.left(0.1), {})
        if isinstance(done, Outcome):
            return done
        if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
            return Outcome("skipped", "no permission to read the counters of this device")
        lines += [{"case": case, **row} for row in parse_ncu(done.stdout)]
    if not lines:
        return Outcome("failed", "ncu found no kernel of ours")
    with (run.out / f"gpu-{run.name}-ncu.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["case", "kernel", *_METRICS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return Outcome("ok", f"{len(lines)} kernels")


def parse_ncu(text: str) -> list[Row]:
    """One row a kernel name, the last launch of each, of ncu's table of one metric a line."""
    start = text.find('"ID"')
    rows: dict[str, Row] = {}
    for line in csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ():
        rows.setdefault(line["Kernel Name"], {"kernel": line["Kernel Name"]})[line["Metric Name"]] = line[
            "Metric Value"
        ]
    return list(rows.values())


def worst(outcomes: list[Outcome]) -> Outcome:
    """One outcome of several: the worst status, all that was said."""
    order = ("failed", "unfinished", "skipped", "ok")
    status = min((outcome.status for outcome in outcomes), key=order.index)
    return Outcome(status, "; ".join(outcome.detail for outcome in outcomes))


def _all(points: list[Point], job: Row, run: Run) -> list[tuple[Point, Row]]:
    found: list[tuple[Point, Row]] = []
    measure(
        points,
        list(BACKENDS),
        "bench.gpu_worker",
        job,
        lambda point, row: found.append((point, row)),
        run.environment,
    )
    return found


def _described(points: list[Point], candidates: list[str] | None = None) -> list[dict[str, Any]]:
    return [{**asdict(point), "index": i, "candidates": candidates or []} for i, point in enumerate(points)]


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str] | Outcome:
    if seconds < 1:
        return Outcome("unfinished", "no time was left")
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Outcome("unfinished", f"stopped after {seconds:.0f} s")


def _command(command: list[str], seconds: float, environment: dict[str, str], unfinished: int | None = None) -> Outcome:
    """Run to its end or to the end of the time; ``unfinished``: the exit code of a command that ran out of its own."""
    done = _run(command, seconds, environment)
    if isinstance(done, Outcome):
        return done
    status = {0: "ok", unfinished: "unfinished"}.get(done.returncode, "failed")
    return Outcome(status, _tail(done.stdout + done.stderr if status == "failed" else done.stdout))


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LAST_LINES:])


STEPS: dict[str, Callable[[Run], Outcome]] = {
    "build": build,
    "tests": tests,
    "repeats": repeats,
    "sanitizer": sanitizer,
    "tune": tune,
}
# What has to be right before a speed-up is reported.
PROOFS = ("tests", "repeats", "sanitizer")
