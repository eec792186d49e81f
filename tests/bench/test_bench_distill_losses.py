"""The benchmark of the attention terms: real rows of a small case, and what becomes of a wrong or dying one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import distill_losses, distill_worker
from bench.harness import Crash, read_rows

SHAPE = {"term": "mse", "layers": 2, "batch": 2, "heads": 2, "length": 40, "head_size": 8}


def test_rows_of_both_ways_have_time_memory_and_error() -> None:
    rows = distill_losses.measure(SHAPE, threads=1, seconds=0.02)
    assert [(row["way"], row["status"]) for row in rows] == [("plain", "ok"), ("ours", "ok")]
    for row in rows:
        assert 0 <= row["error"] < 1e-5
        assert 0 < row["gradient_error"] < 1e-5
        assert row["time_ms_q50"] > 0
        assert row["memory_mib"] is None or row["memory_mib"] < 100
        assert set(row) <= {"way", *distill_losses.COLUMNS}


@pytest.mark.parametrize("term", distill_losses.TERMS)
def test_a_way_that_is_wrong_is_told_and_not_timed(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = distill_worker.OURS[term]
    monkeypatch.setitem(distill_worker.OURS, term, lambda *args, **options: 1.001 * right(*args, **options))
    said: list[dict[str, Any]] = []
    torch.manual_seed(0)
    distill_worker.time_ways({**SHAPE, "term": term, "seconds": 0.02}, said.append)
    assert [(row["way"], row["status"], "time_ms_q50" in row) for row in said] == [
        ("plain", "ok", False),
        ("ours", "wrong", False),
    ]
    assert said[1]["error"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("term", distill_losses.TERMS)
def test_both_ways_give_the_gradients_of_all_queries_and_keys(term: str) -> None:
    job = {**SHAPE, "term": term}
    layers = distill_worker.make_layers(job)
    (loss, gradients), (other, others) = distill_worker.ours(job, layers), distill_worker.plain(job, layers)
    assert [gradient.shape for gradient in gradients] == 4 * [(2, 40, 16)]
    torch.testing.assert_close((loss.float(), gradients), (other, others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("timed", "status", "weighed"),
    [(None, ["crashed", "crashed"], []), (["wrong", "ok"], ["wrong", "ok"], ["ours"])],
)
def test_only_ways_that_are_right_are_weighed(
    timed: list[str] | None, status: list[str], weighed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(module: str, job: dict[str, Any], environment: dict[str, str]) -> Any:
        if job["kind"] == "memory":
            asked.append(job["way"])
            return [{"memory_mib": 7.0}]
        if timed is None:
            raise Crash("died of SIGSEGV", "start")
        return [{"way": way, "status": each} for way, each in zip(distill_losses.WAYS, timed, strict=True)]

    monkeypatch.setattr(distill_losses, "child", child)
    rows = distill_losses.measure(SHAPE, threads=1, seconds=0.02)
    assert [(row["way"], row["status"]) for row in rows] == list(zip(distill_losses.WAYS, status, strict=True))
    assert asked == weighed
    assert [row.get("reason") for row in rows] == 2 * [None if timed else "died of SIGSEGV"]


def test_a_run_writes_its_file_and_tells_of_a_crash(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(module: str, job: dict[str, Any], environment: dict[str, str]) -> Any:
        if job["kind"] == "memory" and job["way"] == "plain":
            raise Crash("died of SIGKILL", "start")
        if job["kind"] == "memory":
            return [{"memory_mib": 7.0}]
        return [{"way": way, "status": "ok", "error": 0.0, "gradient_error": 0.0} for way in distill_losses.WAYS]

    monkeypatch.setattr(distill_losses, "child", child)
    monkeypatch.setattr("sys.argv", ["distill_losses", "--term", "mse", "--length", "128", "--out", str(tmp_path)])
    distill_losses.main()
    rows = read_rows(tmp_path / "distill-losses.csv")
    assert [(row["way"], row["status"], row["reason"], row["memory_mib"]) for row in rows] == [
        ("plain", "crashed", "died of SIGKILL", ""),
        ("ours", "ok", "", "7"),
    ]
    assert [row["length"] for row in rows] == ["128", "128"]
    monkeypatch.setattr(distill_losses, "child", lambda *_: pytest.fail("measured again"))
    distill_losses.main()
