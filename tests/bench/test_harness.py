"""Result files and child processes: what survives a kill, a crash, a hang and another machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import run as command
from bench.harness import ROOT, ResultFile, Row, Run, format_value, measured_commit, read_rows, stamp
from bench.suites import NAMES, Point
from tests.bench import fake_suite

CURRENT: Row = {"machine": "this", "isa": "avx2", "commit": "abc", "date": "2026-01-01", "python": "3", "torch": "2"}
POINT = Point("case", "forward", "fp32", "1")


def run_of(path: Path, **changes: object) -> Run:
    options = {"deadline": time.monotonic() + 120, "current": CURRENT, "threads": 1, "seconds": 0.001, **changes}
    return Run("tests.bench.fake_suite", fake_suite, ResultFile(path, fake_suite.COLUMNS), quick=True, **options)  # type: ignore[arg-type, return-value]


@pytest.mark.slow
def test_every_outcome_has_its_row_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fake.csv"
    assert run_of(path).points(fake_suite.points(False))
    rows = {(row["input"], row["variant"]): row for row in read_rows(path)}
    for size in ("1", "2"):
        assert [rows[size, name]["status"] for name in fake_suite.NAMES[2:]] == ["wrong", "skipped", "crashed"]
        assert float(rows[size, "good"]["time_us_q50"]) > 0
    assert rows["1", "wrong"]["time_us_q50"] == ""
    assert (rows["1", "dies"]["reason"], rows["2", "hangs"]["reason"]) == ("exit code 7", "no sign of life for 1 s")
    assert (rows["1", "good"]["memory_mib"], rows["1", "good"]["length"]) == ("3", "4")
    before, start = path.read_bytes(), time.monotonic()
    assert run_of(path).points(fake_suite.points(False))
    assert path.read_bytes() == before
    assert time.monotonic() - start < 1


@pytest.mark.slow
def test_killed_and_started_again_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"

    def points(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
        names = ("case", "direction", "dtype", "input", "weights")
        return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))

    def rows_of(point: tuple[str, ...]) -> list[dict[str, str]]:
        return [row for row in read_rows(path) if points([row]) == [point]]

    arguments = [sys.executable, "-m", "bench.run", "layers", "--quick", "--threads", "1", "--out", str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while len(points(read_rows(path))) < 2 and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    first = points(read_rows(path))[0]  # whole: the kill came in a later point, which is measured again
    measured = rows_of(first)
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert rows_of(first) == measured
    rows = read_rows(path)
    assert {(row["direction"], row["weights"]) for row in rows} == {
        *(("forward", "hot"), ("forward+backward", "hot"), ("forward", "cold")),
    }


def test_a_deadline_stops_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path / "fake.csv", deadline=0.0)
    for name in fake_suite.NAMES:
        run.file.add(POINT, {"variant": name, "status": "skipped"}, CURRENT)
    assert not run.points([POINT])


def test_rows_of_machines_and_commits(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    file = ResultFile(path, ("more",))
    file.add(POINT, {"variant": "dense", "status": "ok", "time_us_q50": 12.3456, "more": 1}, CURRENT)
    file.add(POINT, {"variant": "dense", "status": "ok"}, {**CURRENT, "machine": "other"})
    file.add(POINT, {"variant": "dense", "memory_mib": 2.0}, CURRENT)
    again = ResultFile(path, ("more",))
    row = again.get(POINT, "dense", CURRENT)
    assert row is not None
    assert (row["time_us_q50"], row["memory_mib"], row["more"]) == ("12.35", "2", "1")
    assert again.get(POINT, "dense", {**CURRENT, "commit": "newer"}) is None
    again.add(POINT, {"variant": "dense", "status": "wrong"}, {**CURRENT, "commit": "newer"})
    rows = read_rows(path)
    assert [(each["machine"], each["commit"], each["time_us_q50"]) for each in rows] == [
        *(("this", "newer", ""), ("other", "abc", "")),
    ]
    assert not list(tmp_path.glob(".*"))


def test_figures_keep_four_digits() -> None:
    assert [format_value(each) for each in (0.00123456, 1234.56, None, 7, "x")] == ["0.001235", "1234.6", "", "7", "x"]


def test_stamp_names_machine_threads_and_commit() -> None:
    row = stamp(3, "GPU")
    assert row["machine"].startswith("GPU; ")
    assert row["machine"].endswith("3 threads")
    assert row["commit"] == measured_commit() != "unknown"


def test_only_selects_points() -> None:
    points = [Point(case, "forward", dtype, "128") for case in ("k8-w1", "k21-w1") for dtype in ("fp32", "bf16")]
    assert command.select(points, "k8.*fp32") == points[:1]
    with pytest.raises(SystemExit, match="--only: expected a pattern of one of the 4 points, got 'k9'"):
        command.select(points, "k9")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpu"])
def test_every_suite_measures_something(name: str, tmp_path: Path) -> None:
    assert command.main([name, "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / f"{name}.csv")
    faults = [row for row in rows if row["status"] not in ("ok", "noisy", "skipped")]
    assert not faults
    assert sum(bool(row["time_us_q50"]) for row in rows) >= 2
