"""The steps of the GPU command that start other tools: what they run, what comes of it."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import gpu_steps
from bench.gpu_problems import Point
from bench.gpu_steps import Outcome, Run, compare_digests, parse_ncu, worst


def test_what_repeats_say() -> None:
    point = Point("k8-ffn", 8)
    good = {"variant": "triton", "times": 3, "differing": 0, "digest": "a"}
    assert compare_digests([[(point, good)], [(point, good)]]) == Outcome("ok", "1 ways, equal results")
    assert compare_digests([[], []]) == Outcome("skipped", "no way of ours runs")
    for change, message in (
        ({"differing": 2}, "k8-ffn triton: 2 of 3 results differ from the first"),
        ({"digest": "b"}, "k8-ffn triton: process 2 computes something else than the first"),
        ({"status": "crashed", "reason": "died of SIGSEGV"}, "k8-ffn triton: died of SIGSEGV"),
    ):
        assert compare_digests([[(point, good)], [(point, {**good, **change})]]) == Outcome("failed", message)


def test_worst_of_several() -> None:
    assert worst([Outcome("ok", "a"), Outcome("skipped", "b")]) == Outcome("skipped", "a; b")
    assert worst([Outcome("unfinished", "a"), Outcome("failed", "b"), Outcome("ok", "c")]).status == "failed"


def test_commands(tmp_path: Path) -> None:
    def outcome(code: str, seconds: float = 30.0) -> Outcome:
        return gpu_steps._command([sys.executable, "-c", code], seconds, {"GIVEN": "7"}, unfinished=3)

    assert outcome("import os; print('said', os.environ['GIVEN'])") == Outcome("ok", "said 7")
    assert outcome("import sys; print('x', file=sys.stderr); sys.exit(4)") == Outcome("failed", "x")
    assert outcome("import sys; sys.exit(3)").status == "unfinished"
    assert outcome("import time; time.sleep(60)", 1.0) == Outcome("unfinished", "stopped after 1 s")
    assert outcome("", 0.5) == Outcome("unfinished", "no time was left")


@pytest.mark.parametrize("code", [0, 9])
def test_sanitizer(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$1 $2 $5 $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/calls\nexit {code}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    outcome = gpu_steps.sanitizer(Run(False, tmp_path, "x", time.monotonic() + 100, 100.0))
    assert outcome.status == ("failed" if code else "ok")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--tool memcheck --target-processes 1", "--tool racecheck --target-processes 1"]


def test_sanitizer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run(False, tmp_path, "x", time.monotonic() + 100, 100.0)
    assert gpu_steps.sanitizer(run) == Outcome("skipped", "compute-sanitizer is not there")
    assert gpu_steps.profiler(run) == Outcome("skipped", "ncu is not there")


def test_profile_is_read() -> None:
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += (
        '"0","mm_kernel","gpu__time_duration.sum","us","3.5"\n"0","mm_kernel","launch__registers_per_thread","","168"\n'
    )
    text += '"1","ffn_kernel","gpu__time_duration.sum","us","7"\n'
    assert parse_ncu(text) == [
        {"kernel": "mm_kernel", "gpu__time_duration.sum": "3.5", "launch__registers_per_thread": "168"},
        {"kernel": "ffn_kernel", "gpu__time_duration.sum": "7"},
    ]
    assert parse_ncu("==ERROR== nothing") == []
