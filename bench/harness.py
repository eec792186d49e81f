"""What every suite shares: result files that survive a kill, and child processes that measure points."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.suites import Point
from kron_kernels.testing import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# What a figure depends on; a commit that changes only prose does not make results old.
_BENCH = ("bench/worker.py", "bench/baselines.py", "bench/suites")
MEASURED_PATHS = ("csrc", "kron_kernels", "setup.py", "CMakeLists.txt", *_BENCH)
STAMP = ("machine", "isa", "commit", "date", "python", "torch", "kron_kernels")
KEY = (*(field.name for field in fields(Point)), "variant")
COLUMNS = (
    *("status", "reason", "error", "tolerance", "rounds", "time_us_q10", "time_us_q50", "time_us_q90"),
    *("speedup_q10", "speedup_q50", "speedup_q90", "memory_mib"),
)
# A fresh large output costs page faults that outweigh a fast kernel: let the allocator keep what it has.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
# For the peak of the resident set it must do the opposite.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
Row = dict[str, Any]


def stamp(threads: int, device: str = "") -> Row:
    """Return the columns that say what a row was measured on; ``device`` names a GPU."""
    machine = describe_machine()
    name = f"{machine['cpu']}, {machine['isa']}, {machine['cores']} cores, {threads} threads"
    return {
        **{column: machine[column] for column in ("isa", "python", "torch", "kron_kernels")},
        "machine": f"{device}; {name}" if device else name,
        "commit": measured_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def measured_commit() -> str:
    """Return the last commit that touched what is measured; ``+changes`` where the tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *MEASURED_PATHS]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class ResultFile:
    """A CSV file of one suite, one row for each point, candidate and machine; written whole after every change."""

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path = path
        self._columns = (*KEY, *dict.fromkeys((*COLUMNS, *columns)), *STAMP)
        self._rows: dict[tuple[str, ...], Row] = {_id(row): row for row in read_rows(path)}

    def get(self, point: Point, name: str, current: Row) -> Row | None:
        """Return the row of a candidate where this commit was measured on this machine."""
        row = self._rows.get(_id({**current, **asdict(point), "variant": name}))
        return row if row is not None and row["commit"] == current["commit"] else None

    def add(self, point: Point, result: Row, current: Row) -> None:
        """Put a row in, or the given columns into the row of the same commit, and write the file."""
        old = self.get(point, result["variant"], current) or {}
        row = {**old, **{name: format_value(value) for name, value in {**asdict(point), **result, **current}.items()}}
        self._rows[_id(row)] = {column: row.get(column, "") for column in self._columns}
        write_rows(self.path, self._columns, self._rows.values())


def _id(row: Row) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in (*KEY, "machine"))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a result file as text, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def format_value(value: object) -> str:
    """Return a value as it stands in the file: four significant digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
    return "" if value is None else str(value)


@dataclass
class Run:
    """One run of a suite: where its rows go, and until when (``time.monotonic()``)."""

    name: str
    suite: ModuleType
    file: ResultFile
    current: Row
    threads: int
    seconds: float
    deadline: float = float("inf")
    quick: bool = False

    def points(self, points: Sequence[Point]) -> bool:
        """Measure what the file lacks of these points; False where the time was over before all was done."""
        # Points that differ in the input alone share their processes.
        for _, some in itertools.groupby(points, key=lambda point: {**asdict(point), "input": ""}):
            chunk = list(some)
            for group in dict.fromkeys(group for point in chunk for group in self.suite.groups(point)):
                # Compiling takes longer than everything else of a quick run.
                names = tuple(name for name in group if not (self.quick and "compiled" in name))
                if not self._time([point for point in chunk if group in self.suite.groups(point)], names):
                    return False
            if not all(self._memory(point) for point in chunk):
                return False
        return True

    def _time(self, points: Sequence[Point], names: tuple[str, ...]) -> bool:
        """Time candidates; after a crash a new process goes on without the one that died."""
        lacking = [point for point in points if not all(self.file.get(point, name, self.current) for name in names)]
        left = {index: list(names) for index in range(len(lacking))}
        while left:
            described = [{"index": i, "point": asdict(lacking[i]), "candidates": each} for i, each in left.items()]
            try:
                for message in self._child({"kind": "time", "points": described}, KEEP_MEMORY):
                    if "result" in message:
                        self._store(lacking[message["index"]], message["result"])
                    elif "done" in message:
                        del left[message["done"]]
                    if time.monotonic() > self.deadline:
                        return not left
            except Crash as crash:
                index = min(left)
                print(f"  {crash.starting}: {crash}", file=sys.stderr)
                died = [crash.starting]
                if crash.starting not in left[index] or crash.starting == "dense":
                    died = left.pop(index)  # nothing to compare the others with
                else:
                    left[index].remove(crash.starting)
                for name in died:
                    self._store(lacking[index], {"variant": name, "status": "crashed", "reason": str(crash)})
        return time.monotonic() < self.deadline

    def _store(self, point: Point, result: Row) -> None:
        """Keep a row; a second process repeats "dense" only to have something to compare with."""
        if result["variant"] == "dense" and self.file.get(point, "dense", self.current):
            return
        self.file.add(point, result, self.current)

    def _memory(self, point: Point) -> bool:
        """Measure peak memory, a fresh process for each candidate."""
        for name in self.suite.memory_names(point) if hasattr(self.suite, "memory_names") else ():
            row = self.file.get(point, name, self.current)
            if row is None or row["memory_mib"] or row["status"] not in ("ok", "noisy"):
                continue
            job = {"kind": "memory", "points": [{"index": 0, "point": asdict(point), "candidates": [name]}]}
            try:
                for message in self._child(job, RETURN_MEMORY):
                    if message.get("bytes") is not None:
                        row = {"variant": name, "memory_mib": message["bytes"] / 2**20}
                        self.file.add(point, row, self.current)
            except Crash as crash:
                print(f"  memory of {name}: {crash}", file=sys.stderr)
            if time.monotonic() > self.deadline:
                return False
        return True

    def _child(self, job: Row, environment: dict[str, str]) -> Iterator[Row]:
        told = {"suite": self.name, "threads": self.threads, "seconds": self.seconds, "quick": self.quick}
        return child({**told, **job}, environment, getattr(self.suite, "silence", silence))


class Crash(Exception):
    """The child process died or fell silent; ``starting`` is the candidate it was at."""

    def __init__(self, reason: str, starting: str) -> None:
        super().__init__(reason)
        self.starting = starting


def silence(_name: str) -> float:
    """Return the seconds after which a candidate that says nothing is taken for hung."""
    return 240.0


def child(job: Row, environment: dict[str, str], silence: Callable[[str], float] = silence) -> Iterator[Row]:
    """Run ``bench.worker`` on a job and yield the JSON objects it writes; raises :class:`Crash` when it dies."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.worker", json.dumps(job)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
    )
    assert process.stdout is not None
    starting, heard = "start", time.monotonic()
    silent, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            if time.monotonic() - heard > silence(starting):
                silent.set()
                process.kill()
                return

    watchdog = threading.Thread(target=watch, daemon=True)
    watchdog.start()
    try:
        for line in process.stdout:
            heard = time.monotonic()
            message = json.loads(line)
            starting = message.get("starting", starting)
            yield message
        if process.wait():
            code = process.returncode
            died = f"died of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise Crash(f"no sign of life for {silence(starting):g} s" if silent.is_set() else died, starting)
    finally:
        ended.set()
        watchdog.join()
        process.kill()
        process.wait()
