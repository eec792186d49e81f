"""``kron-kernels distill``: flags and files to a configuration, errors of one line, and runs from end to end."""

from __future__ import annotations

import json
import sys
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
# What each flag of a run says, the field it is for and its value there.
RUN_FLAGS: list[tuple[str, str, Any]] = [
    ("--epochs 1.5", "epochs", 1.5),
    ("--max-steps 7", "max_steps", 7),
    ("--batch-size 8", "batch_size", 8),
    ("--gradient-accumulation 2", "gradient_accumulation", 2),
    ("--max-length 64", "max_length", 64),
    ("--learning-rate 3e-4", "learning_rate", 3e-4),
    ("--dropout 0.2", "dropout", 0.2),
    ("--train-limit 100", "train_limit", 100),
    ("--seed 3", "seed", 3),
    ("--eval-steps 5", "eval_steps", 5),
    ("--save-steps 6", "save_steps", 6),
    ("--logging-steps 4", "logging_steps", 4),
    ("--precision bf16", "precision", "bf16"),
    ("--name small", "name", "small"),
    ("--variant short", "variant", "short"),
]
TASK_FLAGS: list[tuple[str, str, Any]] = [
    ("--text body", "text", "body"),
    ("--text-pair reply", "text_pair", "reply"),
    ("--label class", "label", "class"),
    ("--regression", "regression", True),
]
STUDENT_FLAGS: list[tuple[str, str, Any]] = [
    ("--teacher-precision fp16", "teacher_precision", "fp16"),
    ("--warm-start plain", "warm_start", "plain"),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DistillConfig, Path, Any]]:
    """Configuration, folder and ``resume`` of every run that was asked for; none is carried out."""
    calls: list[tuple[DistillConfig, Path, Any]] = []

    def run_stage(config: DistillConfig, out: Path, *, resume: Any, progress: Any) -> RunResult:
        calls.append((config, out, resume))
        return RESULT

    monkeypatch.setattr(kron_kernels.distill, "run_stage", run_stage)
    return calls


BASES = {
    "finetune": ("finetune m --task custom --data d --out run", {"student": "m", "task": "custom", "data": "d"}),
    "pretrain": (
        "pretrain --teacher t --preset K8 --data a b --out run",
        {"teacher": "t", "preset": "K8", "data": ["a", "b"]},
    ),
    "task": (
        "task --teacher t --preset K8 --task custom --data d --out run",
        {"teacher": "t", "preset": "K8", "task": "custom", "data": "d"},
    ),
}


@pytest.mark.parametrize("stage", list(BASES))
def test_flags_land_in_their_fields(stage: str, asked: list[tuple[DistillConfig, Path, Any]]) -> None:
    command, wanted = BASES[stage]
    assert main(["distill", *command.split()]) == 0
    plain = asked.pop()
    assert plain == (DistillConfig(stage=stage, **wanted), Path("run"), None)
    flags = [*RUN_FLAGS, *(TASK_FLAGS if stage != "pretrain" else [("--next-sentence", "next_sentence", True)])]
    for flag, field, value in [*flags, *(STUDENT_FLAGS if stage != "finetune" else [])]:
        assert main(["distill", *command.split(), *flag.split()]) == 0
        assert asked.pop()[0] == DistillConfig(stage=stage, **{**wanted, field: value}), flag
    assert main(["distill", *command.split(), "--resume"]) == 0
    assert asked.pop()[2] is True


@pytest.mark.parametrize("stage", ["pretrain", "task"])
def test_weights_and_forms_of_the_terms_land_in_losses(
    stage: str, asked: list[tuple[DistillConfig, Path, Any]]
) -> None:
    for flag, wanted in [
        ("--weight-scores 0", LossConfig(scores=0.0)),
        ("--weight-embedding 0.5 --weight-ffn 2", LossConfig(embedding=0.5, ffn=2.0)),
        ("--weight-logits 3 --weight-supervised 0", LossConfig(logits=3.0, supervised=0.0)),
        ("--attention kl --layers 3", LossConfig(attention="kl", layers=3)),
    ]:
        assert main(["distill", *BASES[stage][0].split(), *flag.split()]) == 0
        assert asked.pop()[0].losses == wanted


def test_flags_have_the_last_word_over_a_file(asked: list[tuple[DistillConfig, Path, Any]], tmp_path: Path) -> None:
    settings = {
        "stage": "task",
        "teacher": "t",
        "preset": "K8",
        "task": "sst2",
        "data": "d",
        "epochs": 4,
        "seed": 2,
        "losses": {"scores": 0.5, "logits_form": "kl", "layers": 2},
        "trainer": {"weight_decay": 0.1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = ["distill", "task", "--config", str(path), "--out", "run"]
    assert main(command) == 0
    assert asked.pop()[0] == DistillConfig.from_dict(settings)
    flags = "--epochs 1 --data other --weight-scores 0 --layers 1"
    assert main([*command, *flags.split()]) == 0
    losses = {"scores": 0.0, "logits_form": "kl", "layers": 1}
    changed = {"epochs": 1.0, "data": "other", "losses": losses}
    assert asked.pop()[0] == DistillConfig.from_dict({**settings, **changed})
    # The configuration of a run is a file for another one.
    run = RunFolder.create(tmp_path / "run", DistillConfig.from_dict(settings).to_dict())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(run.config), encoding="utf-8")
    assert main(["distill", "task", "--config", str(tmp_path / "again.yaml"), "--out", "other"]) == 0
    assert asked.pop()[0] == DistillConfig.from_dict(settings)


def run_error(command: str | list[str], capsys: Capture) -> str:
    arguments = command.split() if isinstance(command, str) else command
    try:
        code: Any = main(["distill", *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    last = captured.err.splitlines()[-1]
    assert last.startswith("kron-kernels")
    assert ": error: " in last
    return last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("finetune m --task sst2", "data: expected a value, got none"),
        ("finetune --task sst2 --data d", "student: expected the model to fine-tune"),
        ("finetune m --data d", "task: expected the name of a task, or custom for one of your own, got none"),
        ("pretrain --preset K8 --data d", "teacher: expected a model in stage pretrain, got none"),
        ("task --teacher t --task sst2 --data d", "student: expected either a folder or a preset, got student=None"),
        ("task --teacher t --student s --preset K8 --task sst2 --data d", "argument --preset: not allowed with"),
        ("task --teacher t --preset K8 --task sst2 --data d --epochs 0", "epochs: expected a number above 0, got 0.0"),
        ("task --teacher t --preset K8 --task sst2 --data d --epochs x", "argument --epochs: invalid float value: 'x'"),
        ("finetune m --task sst2 --data d --precision int8", "precision: expected one of fp32, bf16, fp16, got 'int8'"),
        ("task --teacher t --preset K8 --task sst2 --data d --attention x", "attention: expected 'mse' or 'kl'"),
        ("task --teacher t --preset K8 --task sst2 --data d --weight-ffn -1", "ffn: expected a weight of at least 0"),
        ("finetune m --task sst2 --data d --teacher t", "unrecognized arguments: --teacher t"),
        ("finetune m --task sst2 --data d --config absent.yaml", "No such file or directory: 'absent.yaml'"),
        ("finetune m --task sst2 --data d --resume", "run: expected a run to resume, got"),
    ],
)
def test_bad_requests_are_one_clear_line(flags: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    assert message in run_error([*flags.split(), "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "config: expected a mapping of settings, got"),
        ("epochs: [", "is not YAML"),
        ("epoch: 3", "config: unknown keys epoch; expected some of batch_size"),
        ("stage: pretrain", "stage: expected finetune or none in"),
        ("losses: 3", "losses: expected a mapping of weights and forms, got 3"),
        ("losses: {score: 3}", "losses: unknown keys score; expected some of attention"),
    ],
)
@pytest.mark.parametrize("stage", ["finetune", "task"])
def test_bad_files_are_one_clear_line(stage: str, text: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    flags = [*BASES[stage][0].split()[:-1], str(tmp_path / "run"), "--config", str(path)]
    if stage == "task":
        # A flag goes into what the file says of the losses.
        flags += ["--weight-scores", "0"]
    assert message.replace("finetune", stage) in run_error(flags, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["distill", "report"])
def test_a_missing_library_is_one_clear_line(command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("kron_kernels.distill", "accelerate."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    arguments = BASES["task"][0].split() if command == "distill" else ["run"]
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert f"kron-kernels {command}: error: the library 'accelerate' is not installed" in error
    assert "pip install 'kron_kernels[distill]'" in error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and a task."""
    path = tmp_path_factory.mktemp("distill")
    distill_runs.save_task(path / "data")
    distill_runs.save_bert(path / "bert")
    return path


SHORT = ["--batch-size", "16", "--learning-rate", "3e-3", "--logging-steps", "2"]


@pytest.mark.slow
def test_a_teacher_is_fine_tuned_and_distilled(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = ["--task", "sst2", "--data", str(folder / "data"), *SHORT]
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    command = ["distill", "finetune", str(folder / "bert"), *data, "--out", teacher, "--epochs", "4"]
    assert main([*command, "--name", "dense"]) == 0
    captured = capsys.readouterr()
    result = RunFolder(teacher).result
    assert result is not None
    assert captured.out.startswith("metric    value\n")
    assert captured.out.splitlines()[2].split() == ["accuracy", f"{result.score:.4g}"]
    assert f"{result.parameters:,} parameters, 32 steps in " in captured.out
    assert f"everything is in {teacher}" in captured.out
    assert result.name == "dense"
    assert result.score is not None
    assert result.score > 85

    command = ["distill", "task", "--teacher", f"{teacher}/model", "--preset", "K8", "--warm-start", "plain", *data]
    command += ["--out", student, "--epochs", "2"]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    # Nothing else is on stdout; what training says of its course is on stderr.
    printed = json.loads(captured.out)
    kept = RunFolder(student).result
    assert kept is not None
    assert printed == kept.to_dict()
    assert (printed["kind"], printed["name"], printed["teacher_score"]) == ("task", "K8", result.score)
    assert (Path(student) / "model" / "model.safetensors").is_file()

    # Finished: printed again, as a table, without another step.
    assert main(command) == 0
    captured = capsys.readouterr()
    share = 100 * (kept.score or 0) / result.score
    assert f"score {kept.score:.2f}, the teacher's {result.score:.2f}: {share:.1f} % kept" in captured.out
    assert "16 steps in" in captured.out

    error = run_error([*command[1:], "--seed", "1"], capsys)
    assert "holds a run with another config: seed: expected 0, got 1" in error


def test_models_and_data_that_do_not_suit_are_one_clear_line(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    bert, data = str(folder / "bert"), str(folder / "data")
    sst2 = f"--task sst2 --data {data} --out {tmp_path}/"
    flat = f"task --teacher {bert} {sst2}"
    assert "preset: " in run_error(f"{flat}a --preset K9", capsys)
    assert "K9" in run_error(f"{flat}a --preset K9", capsys)
    assert "teacher: expected a model fine-tuned on sst2 (2 outputs)" in run_error(f"{flat}b --preset K8", capsys)
    assert "expected a folder with config.json" in run_error(f"finetune {tmp_path} {sst2}c", capsys)
    assert "task: expected one of sst2" in run_error(f"finetune {bert} --task x --data d --out {tmp_path}/d", capsys)
    absent = f"finetune {bert} --task sst2 --data {tmp_path}/absent --out {tmp_path}/e"
    assert "data: " in run_error(absent, capsys)
    positions = f"finetune {bert} {sst2}f --max-length 64"
    assert "max_length: expected at most the model's 32, got 64" in run_error(positions, capsys)
    assert not list(tmp_path.iterdir()), "what is refused leaves nothing"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "holds other things" in run_error(f"finetune {bert} {sst2}full", capsys)
