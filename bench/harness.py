"""What every benchmark script shares: result files that survive a kill, child processes, and the machine's name."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kron_kernels.testing import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# What a figure depends on; a commit that changes only prose does not make results old.
MEASURED_PATHS = (
    *("csrc", "kron_kernels", "setup.py", "CMakeLists.txt"),
    *("bench/worker.py", "bench/candidates.py", "bench/ffn_candidates.py", "bench/points.py"),
    *("bench/model_worker.py", "bench/encoder_candidates.py", "bench/process_worker.py", "bench/distill_worker.py"),
    *("bench/distill_step_worker.py", "bench/distill_step_candidates.py", "bench/integrations"),
    *("bench/gpu_worker.py", "bench/gpu_problems.py", "bench/gpu_candidates.py", "bench/gpu_models.py"),
)
MACHINE_COLUMNS = ("cpu", "arch", "isa", "cores", "threads", "os", "python", "torch", "kron_kernels")
STAMP_COLUMNS = ("commit", "date", *MACHINE_COLUMNS)
# A fresh large output costs page faults that outweigh a fast kernel: let the allocator keep what it has.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
# For the peak of the resident set it must do the opposite.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
SILENCE_SECONDS = 240.0

Row = dict[str, Any]


def stamp(threads: int) -> Row:
    """Commit, date and machine: the columns that say what a row was measured on."""
    return {
        "commit": measured_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **describe_machine(),
        "threads": threads,
    }


def measured_commit() -> str:
    """Short hash of the last commit that touched what is measured; ``+changes`` where the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "log", "-1", "--format=%h", "--", *MEASURED_PATHS], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", *MEASURED_PATHS], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if dirty else "")


class ResultFile:
    """A CSV file whose rows are told apart by ``key`` columns, written anew, whole, after every change.

    A new row takes the place of the one with the same key and the same ``machine``: processor, ISA and threads.
    """

    def __init__(
        self,
        path: Path,
        key: Sequence[str],
        columns: Sequence[str],
        machine: Sequence[str] = ("cpu", "isa", "threads"),
    ) -> None:
        self.path = path
        self.columns = (*key, *columns, *STAMP_COLUMNS)
        self._key = (*key, *machine)
        self._rows: dict[tuple[str, ...], Row] = {self._id(row): row for row in read_rows(path)}

    def has(self, key_values: Row, current: Row) -> bool:
        """Whether a row of this key was measured already: same commit, same machine."""
        row = self._rows.get(self._id({**current, **key_values}))
        return row is not None and str(row["commit"]) == str(current["commit"])

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in and write the file."""
        for row in rows:
            text = {column: format_value(row.get(column)) for column in self.columns}
            self._rows[self._id(text)] = text
        write_rows(self.path, self.columns, self._rows.values())

    def _id(self, row: Row) -> tuple[str, ...]:
        return tuple(format_value(row.get(column)) for column in self._key)


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a result file as text, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def format_value(value: object) -> str:
    """As it stands in the file: four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
    return str(value)


class Crash(Exception):
    """The child process died or fell silent; ``starting`` is the candidate it was at."""

    def __init__(self, reason: str, starting: str) -> None:
        super().__init__(reason)
        self.starting = starting


def child(module: str, job: Row, environment: dict[str, str]) -> Iterator[Row]:
    """Run ``python -m module JOB`` and yield the JSON objects it writes; raises :class:`Crash` when it dies."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(job)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
    )
    assert process.stdout is not None
    watchdog = _Watchdog(process, SILENCE_SECONDS)
    starting = "start"
    try:
        for line in process.stdout:
            watchdog.feed()
            message = json.loads(line)
            starting = message.get("starting", starting)
            yield message
        if process.wait():
            silent = f"no sign of life for {SILENCE_SECONDS:.0f} s"
            raise Crash(silent if watchdog.bit else _died(process.returncode), starting)
    finally:
        watchdog.stop()
        process.kill()
        process.wait()


class _Watchdog:
    """Kills a process that says nothing for ``seconds``."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.bit = False
        self._process, self._seconds = process, seconds
        self._timer = self._start()

    def feed(self) -> None:
        self.stop()
        self._timer = self._start()

    def stop(self) -> None:
        self._timer.cancel()
        # A daemon thread that is still on its way out when the interpreter ends may take the process down.
        self._timer.join()

    def _start(self) -> threading.Timer:
        timer = threading.Timer(self._seconds, self._bite)
        timer.daemon = True
        timer.start()
        return timer

    def _bite(self) -> None:
        self.bit = True
        self._process.kill()


def add_run_options(parser: argparse.ArgumentParser, seconds: float | None = None) -> None:
    """The options of every script that measures; ``seconds`` is the default time for each candidate at each point."""
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help=f"time for each candidate ({seconds:g})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, help="minutes after which no new job is started")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")


class Budget:
    """Minutes that a run may take; ``spent()`` says whether they are over."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def spent(self) -> bool:
        return self._end is not None and time.monotonic() > self._end


def _died(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
