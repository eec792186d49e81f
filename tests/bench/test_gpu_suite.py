"""The GPU suite without a GPU: its proof by op, what its tools print, least traffic, and a rehearsal."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import run as command
from bench.harness import read_rows
from bench.suites import Point, gpu, gpu_steps
from bench.suites.gpu_steps import Outcome, Record


def record(tmp_path: Path, **steps: Outcome) -> Record:
    found = Record(tmp_path, {"commit": "abc"}, float("inf"), True)
    for name, outcome in steps.items():
        found.step(name, 100, lambda left, outcome=outcome: outcome)
    return found


def test_proof_is_by_op_and_survives_a_restart(tmp_path: Path) -> None:
    failed = Outcome("failed", "", {"kron_ffn": "k8-ffn cuda: error 1e-1"})
    found = record(tmp_path, smoke=failed, tests=Outcome("ok", ""))
    assert (found.proof("kron_matmul"), found.proof("kron_ffn")) == ("ok", "smoke: k8-ffn cuda: error 1e-1")
    assert found.exit_code() == 1
    again = record(tmp_path, tests=Outcome("failed", "a step that is done is not run again"))
    assert (again.proof("kron_matmul"), again.exit_code()) == ("ok", 1)
    newer = Record(tmp_path, {"commit": "newer"}, float("inf"), True)
    assert newer.proof("kron_ffn") == "smoke not run; tests not run"


def test_without_time_or_a_step_nothing_is_proved(tmp_path: Path) -> None:
    late = Record(tmp_path, {"commit": "abc"}, 0.0, True)
    late.step("smoke", 100, lambda left: Outcome("ok", ""))
    late.step("tests", 100, lambda left: Outcome("ok", ""))
    assert (late.proof("kron_ffn"), late.exit_code()) == ("smoke unfinished; tests unfinished", 3)


def test_failed_tests_are_told_by_op(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="tests.gpu.test_gpu_products" name="test_a[ffn]">'
        '<failure message="assert 1 == 2&#10;more"/></testcase><testcase classname="tests.gpu.test_qkv" name="test_b">'
        '<skipped/></testcase><testcase classname="tests.gpu.test_matmul" name="test_c"/></testsuite></testsuites>'
    )
    faults, passed = gpu_steps.failed_tests([path, tmp_path / "absent.xml"])
    assert faults == {"kron_ffn": "test_gpu_products::test_a[ffn]: assert 1 == 2"}
    assert passed == 1


@pytest.mark.parametrize(
    ("text", "code", "status"),
    [("Device not supported", 1, "skipped"), ("Invalid read in kron_ffn", 9, "failed"), ("", 0, "ok")],
    ids=["unsupported", "fault", "clean"],
)
def test_sanitizer(text: str, code: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], code, text, "")
    monkeypatch.setattr(gpu_steps, "_run", lambda *arguments: done)
    outcome = gpu_steps.sanitizer(record(tmp_path), 10)
    assert (outcome.status, list(outcome.faults)) == (status, ["kron_ffn"] if status == "failed" else [])


def test_ncu_gives_a_row_a_kernel() -> None:
    text = (
        '==PROF==\n"ID","Kernel Name","Metric Name","Metric Value"\n"0","k","a","1"\n"0","k","b","2"\n"1","k","a","3"\n'
    )
    assert gpu_steps.ncu_rows(text) == [{"kernel": "k", "a": "3", "b": "2"}]


def test_least_traffic_and_work() -> None:
    forward, both = (gpu.problem(Point("tiny", kind, "fp32", "5")) for kind in ("forward", "forward+backward"))
    m, n, factors = 30, 12, 6 * 4 + 5 * 3
    assert gpu.traffic(forward) == 4 * (5 * (m + n) + factors)
    assert gpu.traffic(both) == 4 * (5 * (m + n) + factors + 5 * (m + 2 * n) + 2 * factors)
    assert gpu.work(both) == 3 * gpu.work(forward) == 3 * 2 * 5 * forward.case.macs


def test_a_hung_kernel_is_silent_for_twenty_seconds() -> None:
    assert (gpu.silence("k8-ffn forward 1000 cuda"), gpu.silence("dense, compiled")) == (20.0, 120.0)


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = command.main(["gpu", "--quick", "--threads", "1", "--minutes", "4", "--out", str(tmp_path)])
    assert code in (0, 1, 3)
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {"backends", "smoke", "measure", "tests"} <= steps.keys()
    rows = read_rows(tmp_path / "gpu.csv")
    assert {row["variant"] for row in rows if row["time_us_q50"]} >= {"dense", "matmul", "kron_kernels"}
    assert all(row["proof"] for row in rows)
