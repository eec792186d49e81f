"""The steps of the GPU suite that prove and prepare, each with a name and a limit of time.

"failed" means wrong results or a hang, named; "skipped" that the machine lacks what the step needs; "unfinished" that
the time ran out.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bench.harness import ROOT, Crash, Row, Run, child
from bench.suites import Point

OPS = ("kron_matmul", "kron_ffn", "kron_qkv", "kron_embedding", "kron_matmul_norm")
_SHORT = {"ffn": "kron_ffn", "block": "kron_ffn", "qkv": "kron_qkv", "embedding": "kron_embedding", "norm": OPS[4]}
_METRICS = (
    *("gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    *("sm__throughput.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread"),
)
_PROFILED = """
import bench.suites.gpu as suite
problem = suite.problem(suite.Point({!r}, "forward", "bf16", "32768"))
run = problem.runner(suite.candidate(problem, "kron_kernels"))
for _ in range(3):
    run()
"""


class Outcome(NamedTuple):
    """A status ("ok", "failed", "skipped", "unfinished"), what to say, and what failed of each op."""

    status: str
    detail: str
    faults: Mapping[str, str] = MappingProxyType({})


class Record:
    """The outcome of each step so far, in gpu.json; a step that is done on this commit is not run again."""

    def __init__(self, out: Path, current: Row, deadline: float, quick: bool) -> None:
        self.out, self.deadline, self.quick = out, deadline, quick
        self._path, self._current = out / "gpu.json", current
        old = json.loads(self._path.read_text()) if self._path.is_file() else {}
        same = old.get("machine", {}).get("commit") == current["commit"]
        self._steps: dict[str, Row] = old["steps"] if same else {}

    def step(self, name: str, limit: float, function: Callable[[float], Outcome]) -> None:
        """Run a step for at most ``limit`` seconds and write what came of it."""
        if self._steps.get(name, {}).get("status") in ("ok", "skipped"):
            return
        start = time.monotonic()
        left = min(limit, self.deadline - start)
        outcome = function(left) if left > 1 else Outcome("unfinished", "no time was left")
        seconds = round(time.monotonic() - start, 1)
        self._steps[name] = {**outcome._asdict(), "faults": dict(outcome.faults), "seconds": seconds}
        print(f"{name}: {outcome.status}, {seconds} s. {outcome.detail}", flush=True)
        self._path.write_text(json.dumps({"machine": self._current, "steps": self._steps}, indent=1) + "\n")

    def proof(self, op: str) -> str:
        """Return "ok" where every proving step passed for an op, else what failed or is missing."""
        faults = [f"{name}: {step['faults'][op]}" for name, step in self._steps.items() if op in step["faults"]]
        states = {name: self._steps.get(name, {}).get("status", "not run") for name in ("smoke", "tests")}
        open_ = [f"{name} {state}" for name, state in states.items() if state not in ("ok", "failed")]
        return "; ".join([*faults, *open_]) or "ok"

    def exit_code(self) -> int:
        statuses = {step["status"] for step in self._steps.values()}
        return 1 if "failed" in statuses else 3 if "unfinished" in statuses else 0


def backends(left: float) -> Outcome:
    """Say which backends there are."""
    code = "from kron_kernels import backends; [print(f'{n}: {s.reason}') for n, s in backends.available().items()]"
    done = _run([sys.executable, "-c", code], left)
    return (
        done if isinstance(done, Outcome) else Outcome("ok" if done.returncode == 0 else "failed", done.stdout.strip())
    )


def smoke(record: Record, run: Run, left: float) -> Outcome:
    """Check every form against float64 and for equal bits in repeated calls; one process, a hang is named."""
    kinds = (("forward", "1000"), ("forward+backward", "1000"), ("forward", "8455"))
    cases = ("k8-ffn", "k8-attention", "k8-w1", "k8-w2", "k21-ffn", "k21-attention", "k8-qkv", "balanced", "tq-w1")
    todo = [Point(case, kind, "bf16", tokens) for kind, tokens in kinds for case in cases]
    todo = [Point("tiny", "forward+backward", "fp32", "5")] if record.quick else todo
    todo = [point for point in todo if not (point.backward and "qkv" in point.case)]
    faults: dict[str, str] = {}
    done, skipped, end = 0, 0, time.monotonic() + left
    while todo:
        described = [{"index": 0, "point": asdict(point)} for point in todo]
        job = {"suite": "gpu", "kind": "repeat", "points": described, "threads": 2, "times": 2 if record.quick else 200}
        try:
            for message in child(job, {}, run.suite.silence):
                skipped += "skipped" in message
                done += "name" in message
                if message.get("fault"):
                    faults[message["op"]] = f"{message['name']}: {message['fault']}"
                if time.monotonic() > end:
                    return Outcome("failed" if faults else "unfinished", f"{done} forms", faults)
            todo = []
        except Crash as crash:
            case = crash.starting.split()[0]
            dead = next((index for index, point in enumerate(todo) if point.case == case), 0)
            op = next((name for key, name in _SHORT.items() if key in case), OPS[0])
            faults[op] = f"{crash.starting}: {crash}"
            todo = todo[dead + 1 :]
    detail = f"{done} forms right and repeated, {skipped} not for this machine"
    return Outcome("failed" if faults else "ok" if done else "skipped", detail, faults)


def tests(record: Record, left: float) -> Outcome:
    """Run the GPU tests in several processes, 20 s each test; failures are told by op."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome("skipped", "pytest is not installed")
    limit = ["-o", "timeout=20"] if importlib.util.find_spec("pytest_timeout") else []
    shards = 1 if record.quick else min(8, max(1, (os.cpu_count() or 1) // 2))
    reports = [record.out / f"tests-{shard}.xml" for shard in range(shards)]

    def run_shard(shard: int) -> Outcome | subprocess.CompletedProcess[str]:
        # Without the options of the project, which ask for plugins.
        options = [
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            *limit,
            f"--junitxml={reports[shard]}",
        ]
        environment = {"KRON_KERNELS_GPU_TESTS_SHARD": f"{shard}/{shards}"}
        return _run([sys.executable, "-m", "pytest", "tests/gpu", *options], left, environment)

    with ThreadPoolExecutor(shards) as pool:
        outcomes = list(pool.map(run_shard, range(shards)))
    faults, passed = failed_tests(reports)
    if not faults and any(isinstance(outcome, Outcome) for outcome in outcomes):
        return Outcome("unfinished", f"{passed} passed", faults)
    return Outcome(
        "failed" if faults else "ok" if passed else "skipped", f"{passed} passed, {len(faults)} ops failed", faults
    )


def failed_tests(reports: Iterable[Path]) -> tuple[dict[str, str], int]:
    """Return the first failed test of each op, by junit reports, and how many tests passed."""
    faults: dict[str, str] = {}
    passed = 0
    for path in reports:
        for case in ElementTree.parse(path).iter("testcase") if path.is_file() else ():
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            if problem is not None:
                op = next((op for key, op in _SHORT.items() if key in name), OPS[0])
                faults.setdefault(op, f"{name}: {(problem.get('message') or '').splitlines()[0][:120]}")
            passed += problem is None and case.find("skipped") is None
    return faults, passed


def sanitizer(record: Record, left: float) -> Outcome:
    """Run compute-sanitizer over every form on few rows."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Outcome("skipped", "compute-sanitizer is not there")
    cases = ("k8-ffn", "k8-attention", "k8-w1", "k8-w2", "k21-attention", "balanced")
    described = [{"index": 0, "point": asdict(Point(case, "forward+backward", "bf16", "70"))} for case in cases]
    job = {"suite": "gpu", "kind": "repeat", "points": described, "threads": 2, "times": 0}
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "bench.worker",
        json.dumps(job),
    ]
    # Without torch's cache every tensor is an allocation, whose bounds the tool then knows.
    done = _run(command, left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if isinstance(done, Outcome):
        return done
    if "not supported" in done.stdout + done.stderr:
        return Outcome("skipped", "compute-sanitizer does not support this device")
    if done.returncode == 0:
        return Outcome("ok", "no errors")
    text = _tail(done.stdout)
    named = [op for op in OPS if op in done.stdout] or list(OPS)
    return Outcome("failed", text, dict.fromkeys(named, "memcheck"))


def tune(record: Record, left: float) -> Outcome:
    """Tune the tiles of the Triton kernels; what is found goes to --out."""
    if record.quick:
        return Outcome("skipped", "an interpreter has no tiles to tune")
    command = [sys.executable, "-m", "tools.tune_triton", "--minutes", f"{left / 60:.2f}", "--out", str(record.out)]
    done = _run(command, left)
    return done if isinstance(done, Outcome) else Outcome("failed" if done.returncode else "ok", _tail(done.stdout))


def profiler(record: Record, left: float) -> Outcome:
    """Read bandwidth, utilisation and registers of the three main kernels with Nsight Compute; to gpu-ncu.csv."""
    tool = shutil.which("ncu")
    if tool is None or record.quick:
        return Outcome("skipped", "ncu is not there")
    found = []
    for case in ("k8-attention", "k8-ffn", "k21-qkv"):
        command = [tool, "--csv", "--metrics", ",".join(_METRICS), sys.executable, "-c", _PROFILED.format(case)]
        done = _run(command, left / 3)
        if isinstance(done, Outcome):
            return done
        if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
            return Outcome("skipped", "no permission to read the counters of this device")
        found += [{"case": case, **row} for row in ncu_rows(done.stdout)]
    with (record.out / "gpu-ncu.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["case", "kernel", *_METRICS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    return Outcome("ok", f"{len(found)} kernels")


def ncu_rows(text: str) -> list[Row]:
    """Return one row a kernel name, the last launch of each, of ncu's table of one metric a line."""
    start = text.find('"ID"')
    rows: dict[str, Row] = {}
    for line in csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ():
        row = rows.setdefault(line["Kernel Name"], {"kernel": line["Kernel Name"]})
        row[line["Metric Name"]] = line["Metric Value"]
    return list(rows.values())


def choices(rows: Iterable[Row], op: str) -> dict[str, dict[str, Any]]:
    """Return which backend is the faster one for each call of an op, in the form of choices.json."""
    from bench.suites.layers import ALL_CASES, DTYPES
    from kron_kernels.backends import select
    from kron_kernels.backends.base import Call
    from kron_kernels.backends.devices import arch
    from kron_kernels.schemas.product import Product

    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["variant"] in ("triton", "cuda") and row["time_us_q50"] and ALL_CASES[row["case"]].op == op:
            key = (row["case"], row["direction"], row["dtype"], row["input"])
            times.setdefault(key, {})[row["variant"]] = float(row["time_us_q50"])
    found: dict[str, dict[str, Any]] = {}
    for (case, direction, dtype, tokens), each in times.items():
        if len(each) == 2:
            fast, slow = sorted(each, key=lambda name: each[name])
            products = tuple(Product(layer.terms, *layer.a, *layer.b) for layer in ALL_CASES[case].layers)
            name = op if direction == "forward" else f"{op}_backward"
            call = Call(name, products, DTYPES[dtype], int(tokens))
            entry = {"backend": fast, "over": slow, "ratio": each[slow] / each[fast]}
            found.setdefault(f"{call} on {arch(0)}", {})[str(select.token_class(int(tokens)))] = entry
    return found


def _run(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str] | Outcome:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Outcome("unfinished", f"stopped after {seconds:.0f} s")


def _tail(text: str) -> str:
    return re.sub(r"\s*\n\s*", " | ", "\n".join(text.strip().splitlines()[-6:]))
