"""The benchmark of a distillation step: that all ways do the same step, its rows, and its part of the report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import distill_losses, distill_step_candidates, distill_step_worker, distill_steps, points
from bench.distill_step_candidates import (
    COMPILED,
    DENSE,
    NAMES,
    OURS,
    SIZES,
    STOCK,
    TOLERANCE,
    StepProblem,
    StockEmbedding,
    StockLinear,
    Students,
)
from bench.harness import Crash, ResultFile, read_rows
from bench.report import render
from bench.report_distill import judged_steps
from bench.targets import step_reach
from kron_kernels.nn import KronEmbedding, KronLinear

POINT = {"size": "smoke", "preset": "K8"}


@pytest.fixture(scope="module", params=["K8", "K21"])
def students(request: pytest.FixtureRequest) -> Students:
    return Students(SIZES["smoke"], request.param)


@pytest.mark.parametrize("name", [DENSE, STOCK, OURS])
def test_losses_and_gradients_of_each_way_are_right(name: str, students: Students) -> None:
    way = students.way(name)
    outcome = way.step.outcome()
    layer = {DENSE: nn.Linear, STOCK: StockLinear, OURS: KronLinear}[name]
    assert type(way.step.student.bert.encoder.layer[0].output.dense) is layer
    trained = {name for name, parameter in way.step.student.named_parameters() if parameter.requires_grad}
    assert set(outcome) == {"embedding", "scores", "ffn", "logits", "supervised", "loss"} | trained
    assert StepProblem(students).error(way) < 1e-5


@pytest.mark.compile
def test_the_compiled_way_is_right() -> None:
    torch.compiler.reset()
    students = Students(SIZES["smoke"], "K8")
    problem = StepProblem(students)
    way = students.way(COMPILED)
    assert problem.error(way) < 1e-5
    way.step()
    assert problem.error(way) > TOLERANCE, "the next step sees other weights"


def test_a_step_that_is_wrong_is_found(students: Students) -> None:
    for change in (lambda layer: layer.b.data.mul_(1.01), lambda layer: layer.a.requires_grad_(False)):
        way = Students(SIZES["smoke"], "K8").way(OURS)
        change(way.step.student.bert.encoder.layer[1].output.dense)
        assert not StepProblem(Students(SIZES["smoke"], "K8")).error(way) <= TOLERANCE


@pytest.mark.parametrize("name", ["scores", "bert.encoder.layer.1.output.dense.b"])
@pytest.mark.parametrize(("factor", "error"), [(1.01, 0.01), (float("nan"), float("nan"))])
def test_one_wrong_term_or_gradient_is_found(
    name: str, factor: float, error: float, students: Students, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = students.way(OURS)
    outcome = way.step.outcome()
    monkeypatch.setattr(way.step, "outcome", lambda: {**outcome, name: factor * outcome[name]})
    assert StepProblem(students).error(way) == pytest.approx(error, rel=1e-2, nan_ok=True)


def test_a_step_trains_the_student_and_nothing_else(students: Students, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[float] = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda _, most: clipped.append(most))
    way = students.way(STOCK)
    before = copy.deepcopy(way.step.student.state_dict())
    teacher = copy.deepcopy(students.teacher.state_dict())
    way.step()
    # Positions that no sequence reaches and tokens that none has keep their rows, but none of the tables is left out.
    assert not [name for name, value in way.step.student.state_dict().items() if torch.equal(value, before[name])]
    assert all(torch.equal(value, teacher[name]) for name, value in students.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in way.step.student.parameters())
    assert clipped == [1.0]


@pytest.mark.parametrize(
    ("shapes", "order"),
    [(((8, 2), (16, 32)), "b_first"), (((2, 8), (32, 16)), "a_first"), (((4, 4), (8, 8)), "a_first")],
)
def test_stock_layers_compute_the_layer_in_the_cheaper_order(
    shapes: Any, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = KronLinear(shapes[0][1] * shapes[1][1], shapes[0][0] * shapes[1][0], shapes)
    x = torch.randn(2, 3, layer.in_features)
    want = layer(x)
    layer.__class__ = StockLinear
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    other = {"a_first": "b_first", "b_first": "a_first"}[order]
    monkeypatch.setattr(distill_step_candidates, other, lambda *_: pytest.fail("the dearer order"))
    layer(x)


def test_stock_embeddings_compute_the_embedding() -> None:
    table = KronEmbedding(7, 12, 4, padding_idx=0)
    ids = torch.tensor([[1, 6, 0], [2, 2, 5]])
    grad = torch.randn(2, 3, 12)
    want = table(ids)
    gradients = torch.autograd.grad(want, (table.a, table.b), grad)
    table.__class__ = StockEmbedding
    got = table(ids)
    torch.testing.assert_close(got, want)
    # The row of the padding gets none.
    torch.testing.assert_close(torch.autograd.grad(got, (table.a, table.b), grad), gradients)


def test_worker_times_and_weighs_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(distill_step_worker, "OVER", {STOCK: "over_matmul", OURS: "over_compiled"})
    names = [DENSE, STOCK, OURS]
    distill_step_worker.time_points(
        {"points": [{**POINT, "index": 0, "candidates": names}], "seconds": 0.01}, said.append
    )
    rows = [message["result"] for message in said if "result" in message]
    assert said.count({"starting": "timing"}) > 5 * len(names), "a sign of life after each step"
    assert [(row["variant"], row["status"]) for row in rows] == [(name, "ok") for name in names]
    for row in rows:
        assert 0 < row["error"] < 1e-5
        assert row["time_ms_q50"] > 0
        assert set(row) <= {"variant", *distill_steps.COLUMNS}
    assert rows[1]["over_matmul_q50"] == rows[2]["over_compiled_q50"] == 1
    assert rows[2]["over_matmul_q50"] > 0
    assert rows[2]["parameters"] == rows[1]["parameters"] < rows[0]["parameters"]
    for name in names:
        said.clear()
        distill_step_worker.memory_points({"points": [{**POINT, "index": 3, "candidates": [name]}]}, said.append)
        # One before the first step and one after each: a slow machine may need minutes for all of them.
        assert said[:-2] == (1 + distill_step_worker.MEMORY_STEPS) * [{"starting": name}]
        assert said[-1] == {"done": 3}
        peak = said[-2]["result"]["peak"]
        assert peak is None or 0 <= peak < 100 * 2**20


def test_a_run_writes_its_file_and_outlives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[tuple[str, list[str]]] = []

    def child(module: str, job: dict[str, Any], environment: dict[str, str]) -> Any:
        (point,) = job["points"]
        jobs.append((job["kind"], list(point["candidates"])))
        if job["kind"] == "memory" and point["candidates"] == [STOCK]:
            raise Crash("died of SIGKILL", STOCK)
        for name in point["candidates"]:
            figures = {"peak": 3 * 2**20} if job["kind"] == "memory" else {"status": "ok", "time_ms_q50": 2.0}
            yield {"point": 0, "result": {"variant": name, **figures}}
        yield {"done": 0}

    monkeypatch.setattr(points, "child", child)
    monkeypatch.setattr("sys.argv", ["distill_steps", "--size", "minilm", "--preset", "K21", "--out", str(tmp_path)])
    distill_steps.main()
    rows = read_rows(tmp_path / "distill-steps.csv")
    assert [(row["variant"], row["memory_mib"]) for row in rows] == [
        (name, "" if name == STOCK else "3") for name in NAMES
    ]
    columns = ("size", "preset", "layers", "hidden_size", "batch", "length", "status", "time_ms_q50")
    assert [rows[0][name] for name in columns] == ["minilm", "K21", "6", "384", "32", "32", "ok", "2"]
    # A way that died has nothing left to weigh.
    assert [job for job in jobs if job[1]] == [*(("memory", [name]) for name in NAMES), ("time", list(NAMES))]
    monkeypatch.setattr(points, "child", lambda *_: pytest.fail("measured again"))
    distill_steps.main()


MACHINE = {"commit": "abc", "date": "2026-01-01", "cpu": "Some CPU", "isa": "amx", "cores": 2, "threads": 2}


def step_row(variant: str, time: float, memory: float | None, **changes: Any) -> dict[str, Any]:
    row = {"size": "bert-base", "preset": "K8", "variant": variant, "batch": 16, "length": 128, "status": "ok"}
    return {**row, "time_ms_q50": time, "memory_mib": memory, "parameters": 10**7, **MACHINE, **changes}


def over(prefix: str, speedup: float) -> dict[str, float]:
    return {f"{prefix}_q10": 0.8 * speedup, f"{prefix}_q50": speedup, f"{prefix}_q90": 1.25 * speedup}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    ResultFile(tmp_path / "distill-steps.csv", distill_steps.KEY, distill_steps.COLUMNS).add(
        [
            step_row(DENSE, 900, 4000),
            step_row(STOCK, 500, 1500),
            step_row(COMPILED, 400, 1600),
            step_row(OURS, 250, 1000, **over("over_matmul", 2.0), **over("over_compiled", 1.6)),
            step_row(STOCK, 90, 150, size="minilm"),
            step_row(COMPILED, 80, None, size="minilm", status="crashed", reason="died of SIGSEGV"),
            step_row(OURS, 70, 100, size="minilm", **over("over_matmul", 1.25)),
            step_row(OURS, 70, 100, size="smoke"),
            step_row(STOCK, 70, 50, size="smoke", preset="K21"),
            step_row(OURS, 70, 100, size="smoke", preset="K21", status="wrong", reason="relative error 1 above 0"),
        ]
    )
    return tmp_path


def test_report_holds_a_step_to_the_best_of_stock_torch(results: Path) -> None:
    text = render(results)
    # The quickest is compiled, the smallest is not; shares are 1 / 1.6 and 1000 / 1500.
    assert "| bert-base, 16 x 128, K8 | 250 | 400 (matmul, compiled) | 0.62 ✓ | 1000 | 1500 (matmul) | 0.67 ✗ |" in text
    assert "| 0.67 ✗ | 900, 4000 |" in text
    assert "| minilm, 16 x 128, K8 | 70 | 90 (matmul) | 0.80 ✗ | 100 | 150 (matmul) | 0.67 ✗ | - |" in text
    assert "| smoke, 16 x 128, K8 | 70 | - | - | 100 | - | - | - |" in text
    assert "| smoke, 16 x 128, K21 | 70 |" not in text, "a wrong step has no speed-up"
    assert "**What falls short** (3 of 4 figures with a reach)" in text
    assert (
        "| step of distillation | minilm, 16 x 128, K8 | 0.80 (0.64 to 1.00) | ≤ 0.7 | of the time of matmul |" in text
    )
    assert "| matmul, compiled | crashed | died of SIGSEGV | minilm | 1 |" in text


def test_steps_have_a_reach_at_the_sizes_it_was_set_for(results: Path) -> None:
    assert step_reach({"size": "minilm"}) == step_reach({"size": "bert-base"}) == (0.7, 0.6)
    assert step_reach({"size": "smoke"}) == (None, None)
    judged = judged_steps(read_rows(results / "distill-steps.csv"))
    assert [each.verdict.missed for each in judged] == [False, True, True, True]


def test_report_shows_the_attention_terms(tmp_path: Path) -> None:
    shape = {"term": "kl", "layers": 12, "batch": 8, "heads": 12, "length": 512, "head_size": 64, **MACHINE}
    ResultFile(tmp_path / "distill-losses.csv", distill_losses.KEY, distill_losses.COLUMNS).add(
        [
            {**shape, "way": "plain", "status": "ok", "time_ms_q50": 800, "memory_mib": 5000},
            {**shape, "way": "ours", "status": "ok", "time_ms_q50": 400, "memory_mib": 100, **over("speedup", 2.0)},
            {**shape, "length": 128, "way": "plain", "status": "crashed", "reason": "died of SIGKILL"},
        ]
    )
    text = render(tmp_path)
    assert "| kl, 12 layers of 12 heads, 8 x 512 | 800 | 2.00 (1.60 to 2.50) | 5000 | 100 |" in text
    assert "| kl, 12 layers of 12 heads, 8 x 128 | crashed | - | crashed | - |" in text
