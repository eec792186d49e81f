"""The report of runs: what is averaged over what, what is not counted, and what the command writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")


from kron_kernels.cli import main
from kron_kernels.distill.report import build_report
from kron_kernels.distill.run_folder import RunFolder, RunResult

Capture = pytest.CaptureFixture[str]
TEACHER = {"teacher_score": 92.0, "teacher_parameters": 109_482_240}
COSTS = {"peak_memory_bytes": 900_000_000, "train_tokens": 54321}
K8 = RunResult("task", "K8", "sst2", 1, 14_654_216, 1200, 61.4, "", {"accuracy": 0.91}, 91.0, **TEACHER, **COSTS)


def save_run(path: Path, **changes: Any) -> Path:
    """A run, finished where there are changes to the result of K8."""
    run = RunFolder.create(path, {"name": path.name})
    log = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    if changes:
        run.finish(dataclasses.replace(K8, **changes), log)
    else:
        checkpoint = run.checkpoints_path / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two students on two tasks, one of them with three seeds, an ablation on one task, stage 1, and half a run."""
    return [
        save_run(tmp_path / "k8-1", seed=1),
        save_run(tmp_path / "k8-2", seed=2, score=90.0),
        save_run(tmp_path / "k8-3", seed=3, score=89.0),
        save_run(tmp_path / "k8-mrpc", task="mrpc", score=87.5, teacher_score=88.0, parameters=14_655_216),
        save_run(tmp_path / "k8-no-kd", variant="no KD", score=88.8),
        save_run(tmp_path / "k21-sst2", name="K21", score=88.9, parameters=5_228_272),
        save_run(tmp_path / "k21-mrpc", name="K21", task="mrpc", score=86.1, teacher_score=88.0, parameters=5_228_272),
        save_run(tmp_path / "stage1", kind="pretrain", task="wikipedia", score=None, teacher_score=None),
        save_run(tmp_path / "half"),
    ]


def test_models_by_tasks(runs: list[Path]) -> None:
    headers, rows = build_report(runs).table()
    assert headers == ["model", "sst2", "mrpc", "average", "of the teacher", "parameters", "compression"]
    assert rows == [
        ["teacher", "92.0", "88.0", "90.0", "100.0 %", "109.48 M", "1.0x"],
        # 90 of 92 and 87.5 of 88.
        ["K8", "90.0 ± 1.0", "87.5", "88.8", "98.6 %", "14.65 to 14.66 M", "7.5x"],
        # Its share is of the teacher's score on the same task alone.
        ["K8, no KD", "88.8", "-", "-", "96.5 %", "14.65 M", "7.5x"],
        ["K21", "88.9", "86.1", "87.5", "97.2 %", "5.23 M", "20.9x"],
    ]


def test_the_teachers_own_run_is_its_line(tmp_path: Path) -> None:
    unknown = {"teacher_score": None, "teacher_parameters": None, "parameters": 109_482_240}
    path = save_run(tmp_path / "teacher", kind="finetune", name="teacher", score=93.0, **unknown)
    assert build_report([path]).table()[1][0] == ["teacher", "93.0", "93.0", "-", "109.48 M", "-"]


def test_what_each_run_took_is_listed(runs: list[Path]) -> None:
    headers, rows = build_report(runs).cost_table()
    assert headers == ["model", "task", "seed", "score", "steps", "tokens", "seconds", "peak memory, MB", "folder"]
    assert rows[0] == ["K8", "sst2", "1", "91.0", "1,200", "54,321", "61", "900", "k8-1"]


def test_a_run_named_twice_counts_once_but_two_of_the_same_seed_are_refused(tmp_path: Path) -> None:
    first, second = save_run(tmp_path / "first", seed=1), save_run(tmp_path / "second", seed=1, score=95.0)
    assert build_report([first, first]).lines[1].scores["sst2"].seeds == 1
    with pytest.raises(ValueError, match="runs: expected one of K8, sst2, seed 1; got "):
        build_report([first, second])


def test_command_prints_tables_or_json(runs: list[Path], tmp_path: Path, capsys: Capture) -> None:
    arguments = ["report", *map(str, runs)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"Not finished, not counted: {runs[-1]} (step 2)." in shown
    assert main([*arguments, "--json", "--out", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == [str(tmp_path / "out" / name) for name in ("report.md", "table.png", "curves.png")]
    assert "| K8 | 90.0 ± 1.0 | 87.5 | 88.8 | 98.6 % |" in (tmp_path / "out" / "report.md").read_text()
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in document["written"][1:])
    models = {model["model"]: model for model in document["models"]}
    assert models["K8"]["scores"]["sst2"] == {"mean": 90.0, "spread": 1.0, "seeds": 3}
    assert document["unfinished"] == [{"run": str(runs[-1]), "steps": 2}]
    assert main(["report", str(runs[0]), str(tmp_path)]) == 2
    error = f"kron-kernels report: error: run: expected a run's folder, with run.json, got {tmp_path}\n"
    assert capsys.readouterr() == ("", error)
