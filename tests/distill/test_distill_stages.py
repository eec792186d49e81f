"""The stages from folders to folders: fine-tune a teacher, distil on text, distil on the task; killed and resumed."""

from __future__ import annotations

import errno
import itertools
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
from safetensors.torch import load_file

from kron_kernels.compress import start_model
from kron_kernels.convert.presets import preset
from kron_kernels.distill import (
    DistillConfig,
    LossConfig,
    RunFolder,
    RunResult,
    evaluate,
    run_stage,
)
from kron_kernels.distill.student import load_model, with_teachers_head
from kron_kernels.models import KronBertForMaskedLM, KronBertForSequenceClassification, KronBertModel
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
    finetune(path, path / "teacher", epochs=4)
    return path


def finetune(path: Path, out: Path, **settings: Any) -> RunResult:
    options = {"stage": "finetune", "student": str(path / "bert"), "task": "sst2", "data": str(path / "data")}
    options |= {"learning_rate": 3e-3}
    return run_stage(DistillConfig.from_dict({**options, **SHORT, "name": "teacher", **settings}), out)


def task_config(path: Path, **settings: Any) -> DistillConfig:
    options = {"stage": "task", "teacher": str(path / "teacher" / "model"), "task": "sst2", "data": str(path / "data")}
    if "student" not in settings:
        options |= {"preset": "K8", "warm_start": "plain"}
    return DistillConfig.from_dict({**options, **SHORT, "epochs": 3, "learning_rate": 3e-3, **settings})


def pretrain_config(path: Path, **settings: Any) -> DistillConfig:
    options = {"stage": "pretrain", "teacher": str(path / "bert"), "preset": "K8", "warm_start": "plain"}
    options |= {"data": str(path / "text.txt"), "max_length": 24, "epochs": 6}
    return DistillConfig.from_dict({**options, **SHORT, **settings})


def losses(out: Path, key: str = "loss") -> list[float]:
    return [record[key] for record in RunFolder(out).metrics() if key in record]


def test_a_fine_tuned_teacher_has_learned_its_task(folder: Path) -> None:
    result = RunFolder(folder / "teacher").result
    assert result is not None
    assert (result.kind, result.name, result.task, result.teacher_score) == ("finetune", "teacher", "sst2", None)
    assert result.score == evaluate(folder / "teacher" / "model", "sst2", folder / "data").score > 90
    assert result.steps == 4 * 128 // 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher" / "model")
    tokens = sum(len(tokenizer(text)["input_ids"]) for text, _ in distill_runs.sentences(128, 1))
    assert result.train_tokens == 4 * tokens


def test_both_stages_leave_a_model_that_does_the_task(folder: Path, tmp_path: Path) -> None:
    first = run_stage(pretrain_config(folder, learning_rate=1e-2), tmp_path / "first")
    assert losses(tmp_path / "first")[-1] < 0.5 * losses(tmp_path / "first")[0]
    assert first.metrics["loss"] == pytest.approx(
        first.metrics["loss/embedding"] + first.metrics["loss/scores"] + first.metrics["loss/ffn"], rel=1e-4
    )
    assert isinstance(load_model(tmp_path / "first" / "model"), KronBertModel)
    config = task_config(folder, student=str(tmp_path / "first" / "model"), epochs=12, learning_rate=1e-2)
    second = run_stage(config, tmp_path / "second")
    teacher = RunFolder(folder / "teacher").result
    assert teacher is not None
    assert second.teacher_score == teacher.score
    assert second.score is not None
    assert second.score > 85
    assert second.name == "K8"
    assert second.parameters < 0.7 * (second.teacher_parameters or 0)
    model = load_model(tmp_path / "second" / "model")
    assert isinstance(model, KronBertForSequenceClassification)
    assert evaluate(tmp_path / "second" / "model", "sst2", folder / "data").score == second.score
    assert (tmp_path / "second" / "curves.png").stat().st_size > 1000
    # A finished run is not done again.
    before = (tmp_path / "second" / "metrics.jsonl").read_bytes()
    assert run_stage(config, tmp_path / "second") == second
    assert (tmp_path / "second" / "metrics.jsonl").read_bytes() == before


def test_a_run_in_bfloat16_is_scored_as_the_model_it_leaves(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[2, 5, 9, 3]])
    logits = []

    def score(model: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            logits.append(model(ids).logits)
        return evaluate(model, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kron_kernels.distill.work.evaluate", score)
        finetune(folder, tmp_path / "run", precision="bf16", eval_steps=2, max_steps=2)
    with torch.no_grad():
        left = load_model(tmp_path / "run" / "model")(ids).logits
    during, after = logits
    assert torch.equal(after, left)
    assert not torch.equal(during, left)


def test_a_student_learns_from_labels_alone_too(folder: Path, tmp_path: Path) -> None:
    dense = transformers.BertModel.from_pretrained(folder / "bert")
    KronBertModel.from_dense(dense, "K8").save_pretrained(tmp_path / "student")
    transformers.AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(tmp_path / "student")
    result = finetune(folder, tmp_path / "run", student=str(tmp_path / "student"), name="", epochs=12, dropout=0.0)
    assert result.name == "K8"
    assert result.score is not None
    assert result.score > 80
    assert isinstance(load_model(tmp_path / "run" / "model"), KronBertForSequenceClassification)


def test_a_teacher_with_a_language_model_teaches_that_too(folder: Path, tmp_path: Path) -> None:
    distill_runs.save_bert(tmp_path / "mlm", transformers.BertForMaskedLM)
    config = pretrain_config(folder, teacher=str(tmp_path / "mlm"), epochs=1)
    result = run_stage(config, tmp_path / "run")
    assert {"loss/logits", "loss/supervised", "loss/scores"} <= set(result.metrics)
    model = load_model(tmp_path / "run" / "model")
    assert isinstance(model, KronBertForMaskedLM)
    assert model.cls.predictions.decoder.a is model.bert.embeddings.word_embeddings.a


def test_next_sentences_need_a_head_for_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="next_sentence: expected a BertForPreTraining as teacher, got BertModel"):
        run_stage(pretrain_config(folder, next_sentence=True), tmp_path / "run")
    distill_runs.save_bert(tmp_path / "nsp", transformers.BertForPreTraining)
    config = pretrain_config(folder, next_sentence=True, teacher=str(tmp_path / "nsp"), max_steps=2)
    assert run_stage(config, tmp_path / "nsp-run").steps == 2


def test_a_student_takes_the_pooler_and_head_of_its_teacher(folder: Path) -> None:
    teacher = load_model(folder / "teacher" / "model")
    encoder = KronBertModel.from_dense(transformers.BertModel.from_pretrained(folder / "bert"), "K8")
    student = with_teachers_head(encoder, teacher)
    for name in ("bert.pooler.dense.weight", "classifier.bias"):
        torch.testing.assert_close(student.state_dict()[name], teacher.state_dict()[name])
    name = "encoder.layer.0.output.dense.a"
    torch.testing.assert_close(student.bert.state_dict()[name], encoder.state_dict()[name])


def test_a_student_is_fitted_to_what_it_will_see(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs as pairs, with their token types: cut off at the tokens allowed, shortest first."""
    distill_runs.save_questions(tmp_path / "squad")
    distill_runs.save_bert(tmp_path / "qa", transformers.BertForQuestionAnswering)
    seen: list[Any] = []

    def spy(kind: Any, dense: Any, config: Any, batches: Any, **options: Any) -> Any:
        seen.extend(batches)
        return start_model(kind, dense, config, batches, **{**options, "method": "plain"})

    monkeypatch.setattr("kron_kernels.distill.work.start_model", spy)
    monkeypatch.setattr("kron_kernels.distill.work._FITTED_TOKENS", 100)
    options = {"task": "squad", "data": str(tmp_path / "squad"), "max_length": 32, "warm_start": "blockwise"}
    run_stage(task_config(folder, teacher=str(tmp_path / "qa"), max_steps=1, **options), tmp_path / "run")
    (batch,) = seen
    lengths = batch["attention_mask"].sum(1)
    assert 80 < lengths.sum() <= 100
    assert lengths.tolist() == sorted(lengths.tolist())
    assert batch["token_type_ids"].amax(1).tolist() == [1] * len(lengths)


def test_dropout_is_off_with_a_teacher_and_as_it_was_without(folder: Path, tmp_path: Path) -> None:
    result = run_stage(task_config(folder, max_steps=1), tmp_path / "off")
    assert result.steps == 1
    assert load_model(tmp_path / "off" / "model").config.hidden_dropout_prob == 0
    finetune(folder, tmp_path / "on", max_steps=1)
    assert load_model(tmp_path / "on" / "model").config.hidden_dropout_prob == 0.1


WORKER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch, transformers
from kron_kernels.distill.trainer import DistillTrainer
from tests.distill.test_distill_stages import killed_config
from kron_kernels.distill import run_stage
where, at = sys.argv[3], int(sys.argv[4])
owner, name = {{"step": (torch.optim.AdamW, "step"), "save": (transformers.Trainer, "_save_rng_state")}}[where]
real, calls = getattr(owner, name), [0]
def deadly(*args, **kwargs):
    calls[0] += 1
    if calls[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, deadly)
run_stage(killed_config(Path(sys.argv[1])), sys.argv[2])
"""


def killed_config(path: Path) -> DistillConfig:
    return task_config(path, save_steps=5, logging_steps=1, max_steps=14, losses={"layers": 1})


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    """Killed inside of step 9, and again as it writes the checkpoint of step 10."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    out = tmp_path / "killed"
    # The second process starts from step 5: its first checkpoint is that of step 10.
    for where, at in (("step", 9), ("save", 1)):
        command = [sys.executable, str(script), str(folder), str(out), where, str(at)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        last = RunFolder(out).last_checkpoint()
        assert last is not None
        assert last.name == "checkpoint-5"
    assert (out / "checkpoints" / "checkpoint-10").is_dir()
    result = run_stage(killed_config(folder), out)
    whole = run_stage(killed_config(folder), tmp_path / "whole")
    assert result.metrics == whole.metrics
    assert result.steps == whole.steps == 14
    for key in ("loss", "loss/scores", "eval/accuracy"):
        assert losses(out, key) == losses(tmp_path / "whole", key)
    assert len(losses(out)) == 14
    weights = [load_file(path / "model" / "model.safetensors") for path in (out, tmp_path / "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    starts = json.loads((out / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 5, 5]
    assert result.peak_memory_bytes == max(start["peak_memory_bytes"] for start in starts) > 10**8


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    config = task_config(folder, learning_rate=1e30, max_steps=20, save_steps=1, trainer={**QUIET, "max_grad_norm": 0})
    with pytest.raises(FloatingPointError, match=r"step \d+: expected finite losses, got .*; last complete checkpoint"):
        run_stage(config, tmp_path / "run")


def save_longer(folder: Path, path: Path) -> None:
    """A student with twice the positions."""
    config = transformers.BertConfig.from_pretrained(folder / "bert", max_position_embeddings=64)
    KronBertModel.from_dense(transformers.BertModel(config), "K8").save_pretrained(path)


def test_models_that_do_not_match_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher: expected a model fine-tuned on sst2"):
        run_stage(task_config(folder, teacher=str(folder / "bert")), tmp_path / "a")
    other = transformers.BertConfig(vocab_size=99, **distill_runs.SIZES)
    KronBertModel.from_dense(transformers.BertModel(other), "K8").save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="student: expected the teacher's vocabulary"):
        run_stage(task_config(folder, student=str(tmp_path / "student")), tmp_path / "b")
    dense = transformers.BertModel.from_pretrained(folder / "bert")
    KronBertModel.from_dense(dense, {**preset("K8").to_dict(), "version": 2, "weight_dtype": "int8"}).save_pretrained(
        tmp_path / "int8"
    )
    with pytest.raises(ValueError, match="student: expected factors in floating point to train, got int8 ones"):
        run_stage(task_config(folder, student=str(tmp_path / "int8")), tmp_path / "c")
    save_longer(folder, tmp_path / "longer")
    with pytest.raises(ValueError, match="max_length: expected at most the model's 32, got 64"):
        run_stage(task_config(folder, student=str(tmp_path / "longer"), max_length=64), tmp_path / "d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kron_kernels.distill.work.load_model", refuse_to_load)
        with pytest.raises(RuntimeError, match="size mismatch"):
            run_stage(task_config(folder), tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "longer", "student"], (
        "a refused run leaves no folder"
    )


def test_a_student_may_have_more_positions_than_its_teacher(folder: Path, tmp_path: Path) -> None:
    save_longer(folder, tmp_path / "longer")
    run_stage(task_config(folder, student=str(tmp_path / "longer"), max_steps=1), tmp_path / "run")
    assert load_model(tmp_path / "run" / "model").config.max_position_embeddings == 64


def test_another_configuration_in_the_same_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    run_stage(task_config(folder, max_steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"config: .* holds a run with another one: seed: expected 0, got 1"):
        run_stage(task_config(folder, max_steps=1, seed=1), tmp_path / "run")


def test_arguments_of_transformers_pass_through_and_unknown_ones_do_not(folder: Path, tmp_path: Path) -> None:
    config = task_config(folder, max_steps=2, logging_steps=1, trainer={**QUIET, "lr_scheduler_type": "constant"})
    run_stage(config, tmp_path / "run")
    assert set(losses(tmp_path / "run", "learning_rate")) == {3e-3}
    with pytest.raises(ValueError, match=r"trainer: 'lr_schedule' is no argument of transformers\.TrainingArguments"):
        run_stage(task_config(folder, trainer={"lr_schedule": "constant"}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_attention_probabilities_may_be_matched_instead(folder: Path, tmp_path: Path) -> None:
    config = task_config(folder, losses=LossConfig(attention="kl"), epochs=4)
    run_stage(config, tmp_path / "run")
    found = losses(tmp_path / "run", "loss/scores")
    assert found[-1] < found[0]


def test_questions_are_distilled_too(folder: Path, tmp_path: Path) -> None:
    distill_runs.save_questions(tmp_path / "squad")
    distill_runs.save_bert(tmp_path / "qa", transformers.BertForQuestionAnswering)
    options = {"task": "squad", "data": str(tmp_path / "squad"), "max_length": 32, "epochs": 2}
    teacher = finetune(folder, tmp_path / "teacher", student=str(tmp_path / "qa"), **options)
    assert set(teacher.metrics) == {"exact_match", "f1"}
    config = task_config(folder, teacher=str(tmp_path / "teacher" / "model"), **{**options, "epochs": 12})
    run_stage(config, tmp_path / "student")
    found = losses(tmp_path / "student", "loss/logits")
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("present", [False, True])
def test_a_disk_too_small_for_the_checkpoints_is_told_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool
) -> None:
    """Room for three checkpoints of weights and two moments, and for the model; less by those that are there."""
    weights = 4 * (RunFolder(folder / "teacher").result or pytest.fail("no teacher")).parameters
    needed = weights * (3 * (2 if present else 3) + 1)
    if present:
        # Stopped after its last checkpoint, before it is evaluated.
        monkeypatch.setattr("kron_kernels.distill.trainer.DistillTrainer.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(folder, tmp_path / "run", max_steps=1)
        monkeypatch.undo()
    real = shutil.disk_usage(tmp_path)
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: real._replace(free=free))
        if free < needed:
            message = rf"checkpoints: expected {needed / 1e6:.2f} MB free at {tmp_path / 'run'}, got"
            with pytest.raises(OSError, match=message) as caught:
                finetune(folder, tmp_path / "run", max_steps=1)
            assert caught.value.errno == errno.ENOSPC
            assert (tmp_path / "run" / "config.yaml").is_file(), "to go on with once there is room"
        else:
            assert finetune(folder, tmp_path / "run", max_steps=1).score is not None


def test_the_memory_of_a_resumed_run_is_that_of_its_largest_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = itertools.count(100)
    with monkeypatch.context() as patch:
        patch.setattr("kron_kernels.distill.run_folder.peak_memory", lambda: next(growing))
        patch.setattr("kron_kernels.distill.trainer.DistillTrainer.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(folder, tmp_path / "run", max_steps=1)
    monkeypatch.setattr("kron_kernels.distill.run_folder.peak_memory", lambda: 50)
    result = finetune(folder, tmp_path / "run", max_steps=1)
    first, second = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert result.peak_memory_bytes == first["peak_memory_bytes"] > 100
    assert second["peak_memory_bytes"] == 50


def refuse_to_load(*_: Any, **__: Any) -> None:
    raise RuntimeError("size mismatch")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
