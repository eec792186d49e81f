"""The benchmark harness: result files that survive a kill, and children that may die."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, points
from bench.candidates import ALONE, MAIN, MAKERS, Missing
from bench.harness import Budget, Crash, ResultFile, child, format_value, read_rows
from bench.layers import plan, time_points
from bench.points import CASES, COLD_COPIES, COLUMNS, POINT_KEY, Point, complete, mebibytes
from kron_kernels.testing import PEAK
from kron_kernels.testing.compare import compare
from kron_kernels.testing.layers import LayerCase, LayerProblem

MACHINE = {"commit": "abc", "date": "2026-01-01", "cpu": "X", "isa": "avx2", "cores": 2, "threads": 2}
PEAK_FIGURES = {"over_peak": 5.0, "peak_flop": 10**9, "peak_gflops": 200.0}
CHILD = """
import json, os, sys, time
job = json.loads(sys.argv[1])
print(json.dumps({"starting": "first"}), flush=True)
print(json.dumps({"got": job["value"]}), flush=True)
if job["end"] == "signal":
    os.abort()
if job["end"] == "silence":
    time.sleep(60)
sys.exit(3 if job["end"] == "code" else 0)
"""


@pytest.fixture
def module(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "dying_child.py").write_text(CHILD)
    return {"PYTHONPATH": str(tmp_path)}


def test_child_yields_what_it_says(module: dict[str, str]) -> None:
    messages = list(child("dying_child", {"value": 7, "end": "well"}, module))
    assert messages == [{"starting": "first"}, {"got": 7}]


@pytest.mark.parametrize(
    ("end", "reason"), [("signal", "died of SIGABRT"), ("code", "exit code 3"), ("silence", "no sign of life for 1 s")]
)
def test_child_that_dies_raises(end: str, reason: str, module: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SILENCE_SECONDS", 1.0)
    messages = child("dying_child", {"value": 1, "end": end}, module)
    assert next(messages) == {"starting": "first"}
    assert next(messages) == {"got": 1}
    with pytest.raises(Crash, match=reason) as crash:
        next(messages)
    assert crash.value.starting == "first"


def test_result_file_replaces_rows_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.csv"
    file = ResultFile(path, ("case", "tokens"), ("time_us_q50",))
    file.add([{"case": "a", "tokens": 1, "time_us_q50": 12.3456, **MACHINE}])
    file.add([{"case": "a", "tokens": 2, "time_us_q50": None, **MACHINE}])
    again = ResultFile(path, ("case", "tokens"), ("time_us_q50",))
    assert again.has({"case": "a", "tokens": 1}, MACHINE)
    assert not again.has({"case": "b", "tokens": 1}, MACHINE)
    assert not again.has({"case": "a", "tokens": 1}, {**MACHINE, "commit": "def"})
    assert not again.has({"case": "a", "tokens": 1}, {**MACHINE, "threads": 1})
    again.add([{"case": "a", "tokens": 1, "time_us_q50": 7.0, **MACHINE, "commit": "def"}])
    again.add([{"case": "a", "tokens": 1, "time_us_q50": 9.0, **MACHINE, "cpu": "Y"}])
    assert [(row["case"], row["tokens"], row["time_us_q50"], row["cpu"]) for row in read_rows(path)] == [
        ("a", "1", "7", "X"),
        ("a", "2", "", "X"),
        ("a", "1", "9", "Y"),
    ]
    assert os.listdir(path.parent) == ["rows.csv"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (3, "3"), (0.123456, "0.1235"), (123456.78, "123456.8"), (1.5e-7, "1.5e-07"), ("a", "a")],
)
def test_values_keep_four_digits(value: object, text: str) -> None:
    assert format_value(value) == text


def test_budget() -> None:
    assert not Budget(None).spent()
    assert not Budget(1).spent()
    assert Budget(0).spent()


def arguments(**changes: Any) -> argparse.Namespace:
    values = {
        "weights": "both",
        "dtype": ["fp32"],
        "forward_only": False,
        "compile": True,
        "case": ["balanced"],
        "tokens": [1, 128],
        "threads": 1,
        "seconds": 0.01,
    }
    return argparse.Namespace(**{**values, **changes})


def test_plan_leaves_small_backward_and_cold_compilation_out() -> None:
    jobs = list(plan(arguments()))
    described = {
        (points[0].backward, points[0].copies, candidates): [point.tokens for point in points]
        for points, candidates in jobs
    }
    assert described[False, 1, MAIN] == [1, 128]
    assert described[True, 1, MAIN] == [128]
    assert described[False, 1, ALONE] == [1, 128]
    cold = [key for key in described if key[1] == COLD_COPIES]
    assert [(backward, "matmul, compiled" in names) for backward, _, names in cold] == [(False, False)]


def test_points_go_on_after_a_candidate_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[list[list[str]]] = []

    def fake(module: str, job: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
        jobs.append([list(point["candidates"]) for point in job["points"]])
        for point in job["points"]:
            if point["tokens"] == 2 and "LyCORIS" in point["candidates"]:
                raise Crash("died of SIGFPE", "LyCORIS")
            for name in point["candidates"]:
                yield {
                    "point": point["index"],
                    "result": {"variant": name, "status": "ok", "time_us_q50": 10.0, **PEAK_FIGURES},
                }
            yield {"done": point["index"]}

    monkeypatch.setattr(points, "child", fake)
    file = ResultFile(tmp_path / "layers.csv", (*POINT_KEY, "variant"), COLUMNS)
    wanted = [Point("balanced", "fp32", False, 1, tokens) for tokens in (1, 2, 3)]
    names = ("dense", "LyCORIS", "kron_kernels")
    time_points(wanted, names, arguments(), file, MACHINE)
    assert jobs == [[list(names)] * 3, [["dense", "kron_kernels"], list(names)]]
    rows = {(row["tokens"], row["variant"]): row for row in read_rows(file.path)}
    assert len(rows) == 9
    assert (rows["2", "LyCORIS"]["status"], rows["2", "LyCORIS"]["reason"]) == ("crashed", "died of SIGFPE")
    assert all(row["status"] == "ok" for key, row in rows.items() if key != ("2", "LyCORIS"))


def test_a_crash_of_dense_gives_the_point_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(module: str, job: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
        raise Crash("died of SIGSEGV", "timing")
        yield {}

    monkeypatch.setattr(points, "child", fake)
    file = ResultFile(tmp_path / "layers.csv", (*POINT_KEY, "variant"), COLUMNS)
    wanted = [Point("balanced", "fp32", False, 1, 1)]
    time_points(wanted, ("dense", "kron_kernels"), arguments(), file, MACHINE)
    assert [row["status"] for row in read_rows(file.path)] == ["crashed", "crashed"]


def test_rate_counts_the_operations_that_are_done() -> None:
    case = CASES["balanced"]
    result = {"variant": "kron_kernels", "status": "ok", "time_us_q50": 100.0, **PEAK_FIGURES}
    ours = complete(Point("balanced", "fp32", False, 1, 128), result)
    assert ours["gflops"] == pytest.approx(2 * 128 * case.macs / 100e-6 / 1e9)
    # The share is that of the rounds: the square product took five times as long in the same rounds.
    assert ours["peak_share"] == pytest.approx(2 * 128 * case.macs * 5 / PEAK_FIGURES["peak_flop"])
    assert ours["peak_gflops"] == 200.0
    dense = complete(Point("balanced", "fp32", True, 1, 128), {**result, "variant": "dense"})
    assert dense["gflops"] == pytest.approx(3 * 2 * 128 * 768 * 768 / 100e-6 / 1e9)


def test_rate_of_a_block_counts_both_products() -> None:
    case = CASES["k21-ffn"]
    result = {"variant": "kron_kernels", "status": "ok", "time_us_q50": 100.0, **PEAK_FIGURES}
    row = complete(Point("k21-ffn", "fp32", False, 1, 128), result)
    assert row["saving"] == pytest.approx(2 * 768 * 3072 / (2 * 153_600))
    assert row["gflops"] == pytest.approx(2 * 128 * 2 * 153_600 / 100e-6 / 1e9)
    assert row["factors"] == str(case) == "16x2 (x) 192x384 -> 2x16 (x) 384x192"


def test_the_square_product_has_a_row_of_its_own() -> None:
    result = {
        "variant": PEAK,
        "status": "ok",
        "factors": "1024x1024, float32",
        "time_us_q50": 1e4,
        "peak_gflops": 214.7,
    }
    row = complete(Point("balanced", "fp32", False, 1, 128), {**result, "over_peak": 1.0, "peak_flop": 2**31})
    assert (row["factors"], row["gflops"], row["peak_gflops"]) == ("1024x1024, float32", 214.7, 214.7)
    assert "macs" not in row


def test_extra_memory_is_the_peak_beyond_the_output() -> None:
    row = mebibytes({"variant": "a", "peak": 5 * 2**20, "output": 3 * 2**20, "scratch": None})
    assert row == {"variant": "a", "output_mib": 3, "peak_mib": 5, "extra_mib": 2, "scratch_mib": None}
    assert mebibytes({"variant": "a", "peak": None, "output": 1, "scratch": 2**20})["extra_mib"] is None


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "matmul, compiled"])
def test_every_candidate_is_right_or_missing(name: str) -> None:
    problem = LayerProblem(LayerCase("small", (6, 4), (5, 3)), 8, torch.float32)
    try:
        candidate = MAKERS[name](problem)
    except Missing as missing:
        pytest.skip(str(missing))
    candidates = [MAKERS["dense"](problem)] if name != "dense" else []
    results = compare(problem, [*candidates, candidate], seconds=0.002)
    assert [result.status for result in results] == ["ok"] * len(results), results[-1].reason


def test_csv_is_plain(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "a.csv", ("case",), ())
    file.add([{"case": 'with, "quotes"', **MACHINE}])
    with (tmp_path / "a.csv").open(newline="") as text:
        assert next(csv.DictReader(text))["case"] == 'with, "quotes"'
