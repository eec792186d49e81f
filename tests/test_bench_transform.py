"""The benchmark of online transforms: real rows of a small case, and what becomes of a wrong, failing or dying way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.harness import Crash, read_rows
from bench.integrations import transform, transform_worker

JOB = {"dtype": "fp32", "tokens": 5, "left": 4, "right": 6, "threads": 1, "seconds": 0.01, "compile": False}


def rows_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    said: list[dict[str, Any]] = []
    transform_worker.time_ways(job, said.append)
    return {row["way"]: row for row in said}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_have_time_and_error(dtype: str) -> None:
    rows = rows_of({**JOB, "dtype": dtype})
    assert list(rows) == [name for name in transform_worker.WAYS if "compiled" not in name]
    for row in rows.values():
        assert row["status"] == "ok"
        assert 0 < row["error"] < transform_worker.TOLERANCE
        assert row["time_us_q50"] > 0
        assert set(row) <= {"way", *transform.COLUMNS}
    assert rows[transform_worker.BASELINE]["speedup_q50"] == 1


def test_a_wrong_and_a_failing_way_are_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transform_worker.kron_matmul_int8

    def fails() -> transform_worker.Way:
        raise RuntimeError("no such thing")

    def wrong() -> transform_worker.Way:
        return lambda x, a, b: right(1.1 * x, a, b)

    monkeypatch.setitem(transform_worker.WAYS, "kron_matmul_int8", wrong)
    monkeypatch.setitem(transform_worker.WAYS, "fails", fails)
    rows = rows_of(JOB)
    assert rows["kron_matmul_int8"]["status"] == "wrong"
    assert rows["kron_matmul_int8"]["error"] == pytest.approx(0.1, rel=0.1)
    assert (rows["fails"]["status"], rows["fails"]["reason"]) == ("failed", "RuntimeError: no such thing")
    assert all("time_us_q50" not in rows[name] for name in ("kron_matmul_int8", "fails"))
    assert "time_us_q50" in rows[transform_worker.BASELINE]


def test_a_run_writes_its_file_and_tells_of_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(module: str, job: dict[str, Any], environment: dict[str, str]) -> Any:
        if job["tokens"] == 17:
            raise Crash("died of SIGKILL", "start")
        return [{"way": way, "status": "ok"} for way in transform_worker.WAYS if "compiled" not in way]

    monkeypatch.setattr(transform, "child", child)
    monkeypatch.setattr(
        "sys.argv", ["transform", "--smoke", "--threads", "1", "--dtype", "fp32", "--out", str(tmp_path)]
    )
    transform.main()
    rows = read_rows(tmp_path / "integrations-transform.csv")
    assert {(row["tokens"], row["status"]) for row in rows} == {("1", "ok"), ("17", "crashed")}
    assert all(row["reason"] == "died of SIGKILL" for row in rows if row["tokens"] == "17")
    assert len(rows) == 6
