"""The GPU command: its whole way rehearsed on the CPU, its plan, what each outcome leads to, its files."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import gpu
from bench.candidates import Missing
from bench.gpu import CASES, TOKENS, ModelPoint, Record, measure_all, plan
from bench.gpu_candidates import BACKENDS, makers_of
from bench.gpu_problems import EmbeddingProblem, FfnProblem, LayerProblem, Point, QkvProblem, Work
from bench.gpu_report import choices, products_of, write_choices
from bench.gpu_steps import Outcome, Run
from bench.harness import read_rows
from kron_kernels.backends import select
from kron_kernels.schemas.product import Product

REHEARSED_CASES = ("k8-attention", "tq-w1", "k8-ffn", "k8-qkv", "k8-embedding")


def run_of(tmp_path: Path, seconds: float = 100.0) -> Run:
    return Run(True, tmp_path, "rehearsal", time.monotonic() + seconds, 1.0)


def test_rehearsal_goes_all_the_way_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--rehearse", "--minutes", "10", "--out", str(tmp_path), "--skip", "tests", "sanitizer"]
    assert gpu.main(command) == 0, capsys.readouterr()
    rows = read_rows(tmp_path / "gpu-rehearsal.csv")
    assert {row["case"] for row in rows} == {"k8-attention", "tq-w1", "encoder 1x8", "train 1x8"}
    ours = [row for row in rows if row["variant"] in ("triton", "kron_kernels")]
    assert len(ours) == 6
    assert all(row["status"] == "ok" and float(row["error"]) < 1e-5 and row["speedup_q50"] for row in ours)
    assert {row["status"] for row in rows if row["variant"] == "cuda"} <= {"ok", "skipped"}
    assert all(row["status"] == "ok" for row in rows if row["case"].startswith(("encoder", "train")))
    steps = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["steps"]
    statuses = {name: step["status"] for name, step in steps.items()}
    assert {name: statuses[name] for name in ("build", "repeats", "tune", "measure")} == {
        "build": "ok",
        "repeats": "ok",
        "tune": "skipped",
        "measure": "ok",
    }
    assert (tmp_path / "gpu-rehearsal.png").is_file() == (importlib.util.find_spec("matplotlib") is not None)
    before = (tmp_path / "gpu-rehearsal.csv").read_text()
    capsys.readouterr()
    start = time.monotonic()
    assert gpu.main(command) == 0
    assert time.monotonic() - start < 10
    output = capsys.readouterr().out
    assert "build: ok, as before" in output
    assert "points" not in output
    assert (tmp_path / "gpu-rehearsal.csv").read_text() == before


def test_plan_covers_what_is_to_be_measured() -> None:
    jobs = plan(rehearse=False)
    measured = {
        (point.case, point.tokens, point.backward, name)
        for kind, points, names in jobs
        if kind == "time"
        for point in points
        for name in names(point)
    }
    for case in CASES:
        kind = Point(case, 1).kind
        for tokens in TOKENS:
            for name in makers_of(kind):
                assert (case, tokens, False, name) in measured
                assert ((case, tokens, True, name) in measured) == (kind in (LayerProblem, FfnProblem))
    layers = makers_of(LayerProblem)
    assert {"dense", "matmul", "matmul, compiled", "LyCORIS", *BACKENDS} <= set(layers)
    assert "dense, compiled" in makers_of(FfnProblem)
    first_kind, first_points, first_names = jobs[0]
    assert first_kind == "time"
    assert {point.tokens for point in first_points} == {32768}
    assert "dense, compiled" in first_names(Point("k8-ffn", 1))
    assert "matmul, compiled" not in first_names(Point("k8-ffn", 1))
    models = [
        (point.what, point.batch, names(point)) for kind, points, names in jobs if kind != "time" for point in points
    ]
    assert ("encoder", 1, ["dense", "K8", "K21", *(f"{name}, CUDA graph" for name in ("dense", "K8", "K21"))]) in models
    assert ("train", 32, ["dense", "K8", "K21"]) in models


@pytest.mark.parametrize("case", REHEARSED_CASES)
def test_ways_are_right_and_a_wrong_one_is_found(case: str) -> None:
    backward = case in ("k8-attention", "tq-w1", "k8-ffn")
    point = Point(case, 12, "fp32", backward)
    problem = point.problem("cpu", True)
    checked = 0
    for name, make in makers_of(point.kind).items():
        if name in ("triton", "cuda") or "compiled" in name or (name == "LyCORIS" and case != "k8-attention"):
            continue
        try:
            candidate = make(problem)
        except Missing:  # a peer that is not installed
            continue
        assert problem.error(candidate) < 1e-5, name
        checked += 1
    assert checked >= 2
    candidate = makers_of(point.kind)["dense"](problem)
    right = candidate.function
    off = lambda x, *operands: right(x, *operands) + 0.1  # noqa: E731
    assert problem.error(candidate.__class__(**{**vars(candidate), "function": off})) > 1e-3


def test_least_work() -> None:
    layer = Point("k8-attention", 10, "bf16").problem("cpu", False)
    factors = 384 * 384 + 2 * 2
    assert layer.work() == Work(2 * (10 * 768 * 2 + factors), 2 * 10 * 296448)
    both = Point("k8-attention", 10, "bf16", True).problem("cpu", False)
    assert both.work() == Work(2 * (10 * 768 * 5 + 3 * factors), 3 * 2 * 10 * 296448)
    ffn = Point("k8-ffn", 10, "bf16").problem("cpu", False)
    assert ffn.work().flop == 2 * 10 * 2 * 301056
    assert ffn.work().bytes == 2 * (10 * 768 * 2 + 2 * (384 * 384 + 16))
    qkv = Point("k8-qkv", 10, "bf16").problem("cpu", False)
    assert qkv.work().bytes == 2 * (10 * 768 * 4 + 3 * factors)
    terms = Point("tq-w1", 10, "fp32").problem("cpu", False)
    assert terms.work().flop == 2 * 10 * 4 * min(384 * 4 * (2 + 768), 768 * 2 * (384 + 4))


def rows_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: list[dict[str, Any]], **run: Any) -> Any:
    """The rows and outcome of measuring one point whose child gives ``results``."""
    point = Point("k8-attention", 12, "fp32")
    monkeypatch.setattr(gpu, "plan", lambda _rehearse: [("time", [point], lambda _point: ["dense", "triton"])])

    def measure(points: Any, _names: Any, _module: Any, _job: Any, store: Any, _environment: Any) -> None:
        for result in results:
            store(points[0], result)

    monkeypatch.setattr(gpu, "measure", measure)
    one = run_of(tmp_path, run.pop("seconds", 100.0))
    record = Record(one)
    outcome = measure_all(one, record, run.pop("wrong", []))
    return read_rows(tmp_path / "gpu-rehearsal.csv"), outcome


RESULT = {
    "variant": "triton",
    "status": "ok",
    "time_us_q50": 2.0,
    "speedup_q50": 3.0,
    "floor_share": 0.5,
    "wall_us": 9.0,
}


def test_no_speed_up_while_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,), outcome = rows_through(tmp_path, monkeypatch, [RESULT], wrong=["tests", "repeats"])
    assert (row["status"], row["reason"]) == ("red", "tests, repeats failed")
    assert row["speedup_q50"] == row["time_us_q50"] == row["floor_share"] == row["wall_us"] == ""
    assert outcome == Outcome("ok", "{'ok': 0, 'red': 1}")
    (row,), _ = rows_through(tmp_path, monkeypatch, [RESULT])
    assert (row["status"], row["speedup_q50"], row["tolerance"]) == ("ok", "3", "1e-05")


@pytest.mark.parametrize(
    ("variant", "status", "outcome"),
    [
        ("triton", "wrong", "failed"),
        ("cuda", "crashed", "failed"),
        ("triton", "skipped", "ok"),
        ("LyCORIS", "failed", "ok"),
    ],
)
def test_wrong_results_of_ours_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, status: str, outcome: str
) -> None:
    _, found = rows_through(tmp_path, monkeypatch, [{"variant": variant, "status": status}])
    assert found.status == outcome


def test_out_of_time_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {**RESULT, "variant": "dense"}
    rows, outcome = rows_through(tmp_path, monkeypatch, [dense, RESULT], seconds=-1.0)
    assert [row["variant"] for row in rows] == ["dense"]
    assert outcome == Outcome("unfinished", "{'ok': 1}; start again to go on")
    # The point lacks a way: it is measured again, and once whole is not.
    rows, outcome = rows_through(tmp_path, monkeypatch, [dense, RESULT])
    assert (len(rows), outcome.status) == (2, "ok")
    assert rows_through(tmp_path, monkeypatch, [RESULT])[1] == Outcome("ok", "{'ok': 0}")


def test_steps_that_failed_run_again(tmp_path: Path) -> None:
    record = Record(run_of(tmp_path))
    record.step("build", lambda _run: Outcome("failed", "no compiler"))
    assert Record(run_of(tmp_path)).status("build") == "failed"
    record.step("build", lambda _run: Outcome("ok", ""))
    record.step("build", lambda _run: pytest.fail("it was done"))
    record.current["commit"] = "another"
    assert record.status("build") == ""
    late = Record(run_of(tmp_path, -1.0))
    late.step("tests", lambda _run: pytest.fail("there is no time"))
    assert late.status("tests") == "unfinished"


def test_choices_of_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(case: str, variant: str, us: float, **other: str) -> dict[str, str]:
        values = {"case": case, "direction": "forward", "dtype": "bf16", "tokens": "4096", "status": "ok"}
        return {**values, "variant": variant, "time_us_q50": str(us), **other}

    rows = [
        *(row("k8-attention", "triton", 6.0), row("k8-attention", "cuda", 4.0), row("k8-attention", "dense", 1.0)),
        *(row("k8-ffn", "triton", 2.0), row("k8-ffn", "cuda", 3.0, status="wrong")),
        row("encoder 1x128", "K8", 5.0),
        row("k21-qkv", "triton", 1.0, direction="forward+backward"),
        row("k21-qkv", "cuda", 2.0, direction="forward+backward"),
    ]
    found = choices(rows, 90)
    call = "kron_matmul of 384x384 (x) 2x2 in bfloat16 on 90"
    assert found[call] == {"4096": {"backend": "cuda", "over": "triton", "ratio": 1.5}}
    assert [name.split()[0] for name in found] == ["kron_matmul", "kron_qkv_backward"]
    path = tmp_path / "choices.json"
    write_choices(path, {call: {"128": {"backend": "triton", "over": "cuda", "ratio": 2.0}}, "other": {}})
    write_choices(path, found)
    write_choices(path, {})
    merged = json.loads(path.read_text())
    assert set(merged[call]) == {"128", "4096"}
    assert "other" in merged
    # What is written is what a choice reads.
    monkeypatch.setattr(select, "CHOICES", path)
    monkeypatch.setattr(select, "status", lambda name: (True, ""))
    monkeypatch.setattr(select, "refusal", lambda *_arguments: None)
    select._measured.cache_clear()
    select._choose.cache_clear()
    try:
        choice = select.choose("kron_matmul", products_of("k8-attention"), torch.bfloat16, 4096, 90)
    finally:
        select._measured.cache_clear()
        select._choose.cache_clear()
    assert choice == select.Choice("cuda", "measured: 1.50 times as fast as triton")


def test_products_of_cases() -> None:
    assert products_of("tq-w1") == (Product(4, 768, 384, 4, 2),)
    assert products_of("k8-ffn") == (Product(1, 8, 2, 384, 384), Product(1, 2, 8, 384, 384))
    for case in REHEARSED_CASES[2:]:
        problem = Point(case, 2, "fp32").problem("cpu", False)
        assert problem.products() == products_of(case)
    assert {Point(case, 1).kind for case in CASES} == {LayerProblem, FfnProblem, QkvProblem, EmbeddingProblem}


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench.gpu: error: torch finds no CUDA device; --rehearse runs without one\n"


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu.device_name(False) == "h100-80gb-hbm3"
    assert ModelPoint("train", 32, 128).key() == {
        "case": "train 32x128",
        "direction": "step",
        "dtype": "bf16",
        "tokens": 4096,
    }
