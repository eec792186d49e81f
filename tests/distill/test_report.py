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
from kron_kernels.distill.report import build_report, write_report
from kron_kernels.distill.run_folder import RunFolder, RunResult

Capture = pytest.CaptureFixture[str]
K8 = RunResult(
    kind="task",
    name="K8",
    task="sst2",
    seed=1,
    parameters=14_654_216,
    steps=1200,
    seconds=61.4,
    metrics={"accuracy": 0.91},
    score=91.0,
    teacher_score=92.0,
    teacher_parameters=109_482_240,
    peak_memory_bytes=900_000_000,
    train_tokens=54321,
)


def save_run(path: Path, result: RunResult | None = None, steps: int = 3, **changes: Any) -> Path:
    """A run, finished where there is a result or changes to that of K8."""
    run = RunFolder.create(path, {"name": path.name})
    log = [{"step": step, "loss": 1.0 / step} for step in range(1, steps + 1)]
    if result is not None or changes:
        run.finish(dataclasses.replace(result or K8, **changes), log)
    elif log:
        checkpoint = run.checkpoints_path / f"checkpoint-{steps}"
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
        save_run(tmp_path / "half", steps=2),
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


def test_the_teachers_own_runs_are_its_line(runs: list[Path], tmp_path: Path) -> None:
    unknown = {"teacher_score": None, "teacher_parameters": None, "parameters": 109_482_240}
    teacher = [
        save_run(tmp_path / f"t{seed}", kind="finetune", name="teacher", seed=seed, score=92.0 + seed, **unknown)
        for seed in (0, 1)
    ]
    report = build_report([*runs, *teacher])
    assert report.table()[1][0] == ["teacher", "92.5 ± 0.7", "-", "-", "-", "109.48 M", "-"]
    assert [line.model for line in report.lines].count("teacher") == 1


def test_students_of_different_teachers_are_told(tmp_path: Path) -> None:
    paths = [save_run(tmp_path / "a", seed=1), save_run(tmp_path / "b", seed=2, teacher_score=93.0)]
    report = build_report(paths)
    assert report.notes == ["The students' teachers differ on sst2: 92.0 and 93.0."]
    assert report.table()[1][0][1] == "92.5"
    # Each student against its own teacher, seed by seed.
    assert report.lines[1].kept == pytest.approx(100 * 91 / 92.5)


def test_runs_without_a_teacher_have_no_share(tmp_path: Path) -> None:
    path = save_run(tmp_path / "a", teacher_score=None, teacher_parameters=None, parameters=900)
    assert build_report([path]).table()[1] == [["K8", "91.0", "91.0", "-", "900", "-"]]


def test_what_each_run_took_is_listed_and_unfinished_runs_are_named(runs: list[Path]) -> None:
    report = build_report(runs)
    headers, rows = report.cost_table()
    assert headers == ["model", "task", "seed", "score", "steps", "tokens", "seconds", "peak memory, MB", "folder"]
    assert rows[0] == ["K8", "sst2", "1", "91.0", "1,200", "54,321", "61", "900", "k8-1"]
    assert rows[-1][:4] == ["K8", "wikipedia", "1", "-"]
    assert len(rows) == 8
    assert report.remarks() == [
        "± is the sample standard deviation over seeds.",
        f"Not finished, not counted: {runs[-1]} (step 2).",
    ]


def test_a_run_named_twice_counts_once_but_two_of_the_same_seed_are_refused(tmp_path: Path) -> None:
    first, second = save_run(tmp_path / "first", seed=1), save_run(tmp_path / "second", seed=1, score=95.0)
    assert build_report([first, first]).lines[1].scores["sst2"].seeds == 1
    with pytest.raises(ValueError) as error:
        build_report([first, second])
    assert str(error.value) == (
        f"runs: expected one of K8, sst2, seed 1; got {first} and {second}: leave one out, or give it a variant"
    )
    with pytest.raises(ValueError, match="runs: expected one or more folders, got none"):
        build_report([])


def test_files_are_written(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    report = build_report(runs)
    assert write_report(report, out) == [out / "report.md", out / "table.png", out / "curves.png"]
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "report.md", "table.png"]
    text = (out / "report.md").read_text()
    assert text == report.to_markdown()
    assert "| K8 | 90.0 ± 1.0 | 87.5 | 88.8 | 98.6 % | 14.65 to 14.66 M | 7.5x |" in text
    assert f"Not finished, not counted: {runs[-1]} (step 2)." in text
    assert "| K8, no KD | sst2 | 1 | 88.8 | 1,200 |" in text
    for name in ("table.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_finished(tmp_path: Path, capsys: Capture) -> None:
    half = save_run(tmp_path / "half", steps=0)
    assert [path.name for path in write_report(build_report([half]), tmp_path / "out")] == ["report.md"]
    assert main(["report", str(half)]) == 0
    assert capsys.readouterr().out == (f"No finished run has a score.\n\nNot finished, not counted: {half} (step 0).\n")


def test_command_prints_tables_or_json(runs: list[Path], tmp_path: Path, capsys: Capture) -> None:
    arguments = ["report", *map(str, runs)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "K8, no KD" in shown
    assert "90.0 ± 1.0" in shown
    assert "Not finished, not counted: " in shown
    assert "peak memory, MB" in shown
    assert main([*arguments, "--json", "--out", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == [str(tmp_path / "out" / name) for name in ("report.md", "table.png", "curves.png")]
    assert document["tasks"] == ["sst2", "mrpc"]
    models = {model["model"]: model for model in document["models"]}
    assert models["K8"]["scores"]["sst2"] == {"mean": 90.0, "spread": 1.0, "seeds": 3}
    assert models["K8, no KD"]["average"] is None
    assert document["runs"][str(runs[0])]["train_tokens"] == 54321
    assert document["unfinished"] == [{"run": str(runs[-1]), "steps": 2}]


def test_bad_folders_are_one_clear_line(runs: list[Path], tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", str(runs[0]), str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"kron-kernels report: error: run: expected a run's folder, with run.json, got {tmp_path}\n",
    )
    (runs[0] / "result.json").write_text("{")
    assert main(["report", *map(str, runs)]) == 2
    assert f"kron-kernels report: error: {runs[0]}/result.json: " in capsys.readouterr().err
