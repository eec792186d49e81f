"""``kron-kernels distill``: flags and files to a configuration, errors of one line, and runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kron_kernels.cli import main
from tests.distill import distill_runs

pytest.importorskip("accelerate", reason="the extra 'distill' is not installed")
pytest.importorskip("datasets", reason="the extra 'distill' is not installed")

import kron_kernels.distill
from kron_kernels.distill import DistillConfig, LossConfig, RunFolder, RunResult

Capture = pytest.CaptureFixture[str]
RESULT = RunResult("task", "K8", "sst2", 0, parameters=1000, steps=10, seconds=1.5, metrics={"accuracy": 75.0})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DistillConfig, Path, Any]]:
    """Configuration, folder and ``resume`` of every run that was asked for; none is carried out."""
    calls: list[tuple[DistillConfig, Path, Any]] = []

    def run_stage(config: DistillConfig, out: Path, *, resume: Any, progress: Any) -> RunResult:
        calls.append((config, out, resume))
        return RESULT

    monkeypatch.setattr(kron_kernels.distill, "run_stage", run_stage)
    return calls


TASK = {"stage": "task", "teacher": "t", "preset": "K8", "task": "custom", "data": "d"}
# Flags have the names of their fields.
NUMBERS = {"epochs": 1.5, "max_steps": 7, "batch_size": 8, "gradient_accumulation": 2, "max_length": 64, "seed": 3}
NUMBERS |= {"learning_rate": 3e-4, "dropout": 0.2, "train_limit": 100, "eval_steps": 5, "save_steps": 6}
WORDS = {"precision": "bf16", "teacher_precision": "fp16", "warm_start": "plain", "name": "small", "variant": "short"}
WORDS |= {"text": "body", "text_pair": "reply", "label": "class"}
WEIGHTS = {"embedding": 0.5, "scores": 0.0, "ffn": 2.0, "logits": 3.0, "supervised": 4.0}


def test_flags_land_in_their_fields(asked: list[tuple[DistillConfig, Path, Any]]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**TASK, **NUMBERS, **WORDS}.items()][1:]
    flags += [f"--weight-{name}={value}" for name, value in WEIGHTS.items()]
    flags += ["--logging-steps", "4", "--regression", "--attention", "kl", "--layers", "3", "--out", "run"]
    losses = LossConfig(attention="kl", layers=3, **WEIGHTS)
    wanted = {**TASK, **NUMBERS, **WORDS, "logging_steps": 4, "regression": True, "losses": losses}
    for resume, more in ((None, []), (True, ["--resume"])):
        assert main(["distill", "task", *flags, *more]) == 0
        assert asked.pop() == (DistillConfig(**wanted), Path("run"), resume)
    command = "distill pretrain --teacher t --preset K8 --data a b --next-sentence --out run"
    assert main(command.split()) == 0
    assert asked.pop()[0] == DistillConfig("pretrain", teacher="t", preset="K8", data=["a", "b"], next_sentence=True)


def test_flags_have_the_last_word_over_a_file(asked: list[tuple[DistillConfig, Path, Any]], tmp_path: Path) -> None:
    losses: dict[str, Any] = {"scores": 0.5, "logits_form": "kl", "layers": 2}
    options = {"epochs": 4, "seed": 2, "losses": losses, "trainer": {"weight_decay": 0.1}}
    settings = {"stage": "task", "teacher": "t", "preset": "K8", "task": "sst2", "data": "d", **options}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = ["distill", "task", "--config", str(path), "--out", "run"]
    assert main(command) == 0
    assert asked.pop()[0] == DistillConfig.from_dict(settings)
    flags = "--epochs 1 --data other --weight-scores 0 --layers 1"
    assert main([*command, *flags.split()]) == 0
    changed = {"epochs": 1.0, "data": "other", "losses": {**losses, "scores": 0.0, "layers": 1}}
    assert asked.pop()[0] == DistillConfig.from_dict({**settings, **changed})


def run_error(arguments: list[str], capsys: Capture) -> str:
    try:
        code: Any = main(["distill", *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    return captured.err.splitlines()[-1].partition(": error: ")[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("finetune m --task sst2", "data: expected a value, got none"),
        ("task --teacher t --student s --preset K8 --task sst2 --data d", "argument --preset: not allowed with"),
        ("task --teacher t --preset K8 --task sst2 --data d --epochs x", "argument --epochs: invalid float value: 'x'"),
        ("finetune m --task sst2 --data d --teacher t", "unrecognized arguments: --teacher t"),
        ("finetune m --task sst2 --data d --config bad.yaml", "config: unknown keys epoch; expected some of"),
        ("finetune m --task sst2 --data d --resume", "run: expected a run to resume, got"),
    ],
)
def test_bad_requests_are_one_clear_line(
    flags: str, message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("epoch: 3", encoding="utf-8")
    assert message in run_error([*flags.split(), "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and a task."""
    path = tmp_path_factory.mktemp("distill")
    distill_runs.save_task(path / "data")
    distill_runs.save_bert(path / "bert")
    return path


@pytest.mark.slow
def test_a_teacher_is_fine_tuned_and_distilled(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = ["--task", "sst2", "--data", str(folder / "data"), "--batch-size", "16"]
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    assert main(["distill", "finetune", str(folder / "bert"), *data, "--out", teacher, "--epochs", "4"]) == 0
    captured = capsys.readouterr()
    result = RunFolder(teacher).result
    assert result is not None
    assert captured.out.splitlines()[2].split() == ["accuracy", f"{result.score:.4g}"]
    assert f"{result.parameters:,} parameters, 32 steps in " in captured.out

    command = ["distill", "task", "--teacher", f"{teacher}/model", "--preset", "K8", "--warm-start", "plain", *data]
    command += ["--out", student, "--epochs", "2"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = RunFolder(student).result
    assert kept is not None
    assert printed == kept.to_dict()

    # Finished: printed again, as a table, without another step.
    assert main(command) == 0
    assert f"score {kept.score:.2f}, the teacher's {result.score:.2f}: " in capsys.readouterr().out


def test_models_and_data_that_do_not_suit_are_one_clear_line(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    bert, data, out = str(folder / "bert"), str(folder / "data"), str(tmp_path / "run")
    for command, message in [
        (f"task --teacher {bert} --preset K9 --task sst2 --data {data}", "K9"),
        (f"task --teacher {bert} --preset K8 --task sst2 --data {data}", "teacher: expected a model fine-tuned on sst"),
        (f"finetune {bert} --task sst2 --data {tmp_path}/absent", "data: "),
        (f"finetune {bert} --task sst2 --data {data} --max-length 64", "expected at most the model's 32, got 64"),
    ]:
        assert message in run_error([*command.split(), "--out", out], capsys)
        assert not list(tmp_path.iterdir()), "what is refused leaves nothing"
