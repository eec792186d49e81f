"""The stages from folders to folders: fine-tune a teacher, distil on text, distil on the task; killed and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from kron_kernels.distill import DistillConfig, RunFolder, evaluate, run_stage
from kron_kernels.distill.student import load_model
from tests.distill import distill_runs

QUIET = {"disable_tqdm": True}
SHORT: dict[str, Any] = {"batch_size": 16, "logging_steps": 2, "save_steps": 100, "trainer": QUIET}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a dense encoder, and a teacher fine-tuned on the data."""
    path = tmp_path_factory.mktemp("distill")
    distill_runs.save_task(path / "data")
    distill_runs.save_text(path / "text.txt")
    distill_runs.save_bert(path / "bert")
    options = {"stage": "finetune", "student": str(path / "bert"), "task": "sst2", "data": str(path / "data")}
    options |= {"learning_rate": 3e-3, "epochs": 4, "name": "teacher"}
    run_stage(DistillConfig.from_dict({**options, **SHORT}), path / "teacher")
    return path


def task_config(path: Path, **settings: Any) -> DistillConfig:
    options = {"stage": "task", "teacher": str(path / "teacher" / "model"), "task": "sst2", "data": str(path / "data")}
    if "student" not in settings:
        options |= {"preset": "K8", "warm_start": "plain"}
    return DistillConfig.from_dict({**options, **SHORT, "epochs": 3, "learning_rate": 3e-3, **settings})


def losses(out: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in RunFolder(out).log if key in record]


def test_a_fine_tuned_teacher_has_learned_its_task(folder: Path) -> None:
    result = RunFolder(folder / "teacher").result
    assert result.score == evaluate(folder / "teacher" / "model", "sst2", folder / "data").score > 90
    assert result.steps == 4 * 128 // 16
    # A word is a token; [CLS] and [SEP] come with each sentence.
    assert result.train_tokens == 4 * sum(len(text.split()) + 2 for text, _ in distill_runs.sentences(128, 1))
    assert {path.name for path in (folder / "teacher").iterdir()} >= {"run.json", "result.json", "curves.png"}


@pytest.mark.slow
def test_both_stages_leave_a_model_that_does_the_task(folder: Path, tmp_path: Path) -> None:
    options = {"stage": "pretrain", "teacher": str(folder / "bert"), "preset": "K8", "warm_start": "plain"}
    options |= {"data": str(folder / "text.txt"), "max_length": 24, "epochs": 6, "learning_rate": 1e-2}
    pretrain = {**options, **SHORT}
    first = run_stage(DistillConfig.from_dict(pretrain), tmp_path / "first")
    assert losses(tmp_path / "first")[-1] < 0.5 * losses(tmp_path / "first")[0]
    terms = sum(first.metrics[f"loss/{term}"] or 0 for term in ("embedding", "scores", "ffn"))
    assert first.metrics["loss"] == pytest.approx(terms, rel=1e-4)
    config = task_config(folder, student=str(tmp_path / "first" / "model"), epochs=12, learning_rate=1e-2)
    second = run_stage(config, tmp_path / "second")
    assert second.teacher_score > 90
    assert second.score > 85
    assert second.parameters < 0.7 * (second.teacher_parameters or 0)
    assert evaluate(tmp_path / "second" / "model", "sst2", folder / "data").score == second.score
    # A teacher with a language model teaches that and next sentences too.
    distill_runs.save_bert(tmp_path / "nsp", transformers.BertForPreTraining)
    pretrain |= {"next_sentence": True, "teacher": str(tmp_path / "nsp"), "max_steps": 2}
    third = run_stage(DistillConfig.from_dict(pretrain), tmp_path / "third")
    assert {"loss/logits", "loss/supervised", "loss/scores"} <= set(third.metrics)
    # A finished run is not done again.
    before = (tmp_path / "second" / "result.json").read_bytes()
    assert run_stage(config, tmp_path / "second") == second
    assert (tmp_path / "second" / "result.json").read_bytes() == before


WORKER = """
import os, signal, sys
from pathlib import Path
import torch, transformers
from tests.distill.test_run import killed_config
from kron_kernels.distill import DistillConfig, run_folder, run_stage
where, at = sys.argv[3], int(sys.argv[4])
owner, name = {"step": (torch.optim.AdamW, "step"), "save": (transformers.Trainer, "_save_rng_state"),
               "end": (run_folder.RunFolder, "finish")}[where]
real, calls = getattr(owner, name), [0]
def deadly(*args, **kwargs):
    calls[0] += 1
    if calls[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, deadly)
run_stage(killed_config(Path(sys.argv[1])), sys.argv[2])
"""


def killed_config(path: Path, **settings: Any) -> DistillConfig:
    return task_config(path, save_steps=5, logging_steps=1, max_steps=14, losses={"layers": 1}, **settings)


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    """Killed inside of step 9, as it writes the checkpoint of step 10, and before its result: after the last step."""
    out, root = tmp_path / "killed", Path(__file__).parents[2]
    for where, at, left in (("step", 9, 5), ("save", 1, 5), ("end", 1, 14)):
        command = [sys.executable, "-c", WORKER, str(folder), str(out), where, str(at)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        last = RunFolder(out).last_checkpoint()
        assert last is not None
        assert last.name == f"checkpoint-{left}"
    assert not (out / "result.json").exists()
    result = run_stage(killed_config(folder), out)
    whole = run_stage(killed_config(folder), tmp_path / "whole")
    assert result.metrics == whole.metrics
    assert result.steps == whole.steps == 14
    for key in ("loss", "loss/scores", "eval/accuracy"):
        assert losses(out, key)[:14] == losses(tmp_path / "whole", key)
    weights = [load_file(path / "model" / "model.safetensors") for path in (out, tmp_path / "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_other_data_and_another_teacher_are_refused_on_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "data", copy / "data")
    shutil.copytree(folder / "teacher" / "model", copy / "teacher" / "model")
    config = task_config(copy, max_steps=2)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Ended after its last checkpoint, before it is evaluated.
        patch.setattr("kron_kernels.distill.trainer.DistillTrainer.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config, tmp_path / "run")
    train = copy / "data" / "train.tsv"
    lines = train.read_text().splitlines(keepends=True)
    train.write_text("".join([lines[0], *lines[:0:-1]]))
    with pytest.raises(ValueError, match=r"data: .* holds a run with another data"):
        run_stage(config, tmp_path / "run")
    train.write_text("".join(lines))
    teacher = load_model(copy / "teacher" / "model")
    with torch.no_grad():
        teacher.classifier.bias += 0.01
    teacher.save_pretrained(copy / "teacher" / "model")
    with pytest.raises(ValueError, match=r"teacher: .* holds a run with another teacher"):
        run_stage(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    config = task_config(folder, learning_rate=1e30, max_steps=20, save_steps=1, trainer={**QUIET, "max_grad_norm": 0})
    with pytest.raises(FloatingPointError, match=r"step \d+: expected finite losses, got .*; last whole checkpoint: "):
        run_stage(config, tmp_path / "run")


@pytest.mark.slow
def test_question_answering_is_distilled(folder: Path, tmp_path: Path) -> None:
    answers = {"text": ["king"], "answer_start": [9]}
    row = {"id": "a", "question": "likes the", "context": "the kind king likes a song", "answers": answers}
    (tmp_path / "squad").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "squad" / f"{name}.jsonl").write_text(json.dumps(row))
    distill_runs.save_bert(tmp_path / "qa", transformers.BertForQuestionAnswering)
    options = {"task": "squad", "data": str(tmp_path / "squad"), "max_length": 32, "max_steps": 1}
    result = run_stage(task_config(folder, teacher=str(tmp_path / "qa"), **options), tmp_path / "run")
    assert set(result.metrics) == {"exact_match", "f1"}


@pytest.mark.slow
def test_a_full_disk_is_one_line_before_and_during_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = task_config(folder, max_steps=2, save_steps=1)
    real = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: real._replace(free=20_000))
        with pytest.raises(OSError, match=r"checkpoints: expected 0\.\d+ MB free at .*, got 0.02 MB"):
            run_stage(config, tmp_path / "run")
    assert (tmp_path / "run" / "start").is_dir(), "to resume once there is room"

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save", full)
        with pytest.raises(OSError, match=r"checkpoints: the disk is full at .*run; make room and run the same"):
            run_stage(config, tmp_path / "run")
    assert run_stage(config, tmp_path / "run").steps == 2
