"""The feed-forward benchmark: what it plans, and a run of the script on little."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from bench import ffn
from bench.ffn import plan
from bench.harness import read_rows
from bench.points import COLD_COPIES
from kron_kernels.testing import PEAK


def arguments(**changes: Any) -> argparse.Namespace:
    values = {"dtype": ["fp32", "bf16"], "case": ["k8-ffn"], "tokens": [1, 128, 4096], "reach": False, "compile": True}
    return argparse.Namespace(**{**values, **changes})


def test_plan_starts_with_what_has_a_reach() -> None:
    jobs = [
        (points[0].dtype, points[0].backward, points[0].copies, [point.tokens for point in points], names)
        for points, names in plan(arguments())
    ]
    assert [job[:4] for job in jobs] == [
        ("fp32", False, 1, [1, 128, 4096]),
        ("bf16", False, 1, [1, 128, 4096]),
        ("fp32", True, 1, [4096]),
        ("fp32", False, COLD_COPIES, [1, 128]),
        ("bf16", False, COLD_COPIES, [1, 128]),
    ]
    assert ["dense, compiled" in job[4] for job in jobs] == [True, True, True, False, False]
    assert len(list(plan(arguments(reach=True)))) == 2
    assert not any("compiled" in name for _, names in plan(arguments(compile=False)) for name in names)


def test_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--case", "balanced-ffn", "--tokens", "2", "--dtype", "fp32", "--seconds", "0.001"]
    monkeypatch.setattr("sys.argv", ["ffn", "--reach", "--no-compile", *options, "--out", str(tmp_path)])
    ffn.main()
    rows = {row["variant"]: row for row in read_rows(tmp_path / "ffn.csv")}
    assert set(rows) == {"dense", "dense, packed", "matmul", "kron_matmul twice", "kron_kernels", PEAK}
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    assert all(float(row["peak_share"]) > 0 for name, row in rows.items() if name != PEAK and row["status"] == "ok")
    assert rows[PEAK]["factors"].startswith("1024x1024")
    before = (tmp_path / "ffn.csv").stat().st_mtime_ns
    ffn.main()
    assert (tmp_path / "ffn.csv").stat().st_mtime_ns == before, "measured already"
