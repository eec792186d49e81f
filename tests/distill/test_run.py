"""The stages from folders to folders: fine-tune a teacher, distil on text, distil on the task; killed and resumed."""

from __future__ import annotations

import errno
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

from kron_kernels.compress import start_model
from kron_kernels.convert.presets import preset
from kron_kernels.distill import DistillConfig, RunFolder, RunResult, evaluate, run_stage
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
    return [record[key] for record in RunFolder(out).log if key in record]


def test_a_fine_tuned_teacher_has_learned_its_task(folder: Path) -> None:
    result = RunFolder(folder / "teacher").result
    assert result is not None
    assert (result.kind, result.name, result.task, result.teacher_score) == ("finetune", "teacher", "sst2", None)
    assert result.score == evaluate(folder / "teacher" / "model", "sst2", folder / "data").score > 90
    assert result.steps == 4 * 128 // 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher" / "model")
    tokens = sum(len(tokenizer(text)["input_ids"]) for text, _ in distill_runs.sentences(128, 1))
    assert result.train_tokens == 4 * tokens
    assert (result.peak_memory_bytes or 0) > 10**8
    assert {path.name for path in (folder / "teacher").iterdir()} >= {"run.json", "result.json", "curves.png"}


@pytest.mark.slow
def test_both_stages_leave_a_model_that_does_the_task(folder: Path, tmp_path: Path) -> None:
    first = run_stage(pretrain_config(folder, learning_rate=1e-2), tmp_path / "first")
    assert losses(tmp_path / "first")[-1] < 0.5 * losses(tmp_path / "first")[0]
    terms = sum(first.metrics[f"loss/{term}"] or 0 for term in ("embedding", "scores", "ffn"))
    assert first.metrics["loss"] == pytest.approx(terms, rel=1e-4)
    assert isinstance(load_model(tmp_path / "first" / "model"), KronBertModel)
    config = task_config(folder, student=str(tmp_path / "first" / "model"), epochs=12, learning_rate=1e-2)
    second = run_stage(config, tmp_path / "second")
    teacher = RunFolder(folder / "teacher").result
    assert teacher is not None
    assert second.teacher_score == teacher.score
    assert (second.score or 0) > 85
    assert second.name == "K8"
    assert second.parameters < 0.7 * (second.teacher_parameters or 0)
    assert isinstance(load_model(tmp_path / "second" / "model"), KronBertForSequenceClassification)
    assert evaluate(tmp_path / "second" / "model", "sst2", folder / "data").score == second.score
    # A finished run is not done again.
    before = (tmp_path / "second" / "result.json").read_bytes()
    assert run_stage(config, tmp_path / "second") == second
    assert (tmp_path / "second" / "result.json").read_bytes() == before


def test_a_run_in_bfloat16_is_scored_as_the_model_it_leaves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, logits = torch.tensor([[2, 5, 9, 3]]), []

    def score(model: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            logits.append(model(ids).logits)
        return evaluate(model, *args, **options)

    monkeypatch.setattr("kron_kernels.distill.prepare.evaluate", score)
    finetune(folder, tmp_path / "run", precision="bf16", eval_steps=2, max_steps=2)
    during, after = logits
    with torch.no_grad():
        assert torch.equal(after, load_model(tmp_path / "run" / "model")(ids).logits)
    assert not torch.equal(during, after)


def test_a_teacher_with_a_language_model_teaches_that_and_next_sentences(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="next_sentence: expected a BertForPreTraining as teacher, got BertModel"):
        run_stage(pretrain_config(folder, next_sentence=True), tmp_path / "run")
    distill_runs.save_bert(tmp_path / "mlm", transformers.BertForMaskedLM)
    result = run_stage(pretrain_config(folder, teacher=str(tmp_path / "mlm"), max_steps=2), tmp_path / "run")
    assert {"loss/logits", "loss/supervised", "loss/scores"} <= set(result.metrics)
    model = load_model(tmp_path / "run" / "model")
    assert isinstance(model, KronBertForMaskedLM)
    assert model.cls.predictions.decoder.a is model.bert.embeddings.word_embeddings.a
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
    """Questions and contexts with their token types: cut off at the tokens allowed, shortest first."""
    distill_runs.save_questions(tmp_path / "squad")
    distill_runs.save_bert(tmp_path / "qa", transformers.BertForQuestionAnswering)
    seen: list[Any] = []

    def spy(kind: Any, dense: Any, config: Any, batches: Any, **options: Any) -> Any:
        seen.extend(batches)
        return start_model(kind, dense, config, batches, **{**options, "method": "plain"})

    monkeypatch.setattr("kron_kernels.distill.prepare.start_model", spy)
    monkeypatch.setattr("kron_kernels.distill.prepare._FITTED_TOKENS", 100)
    options = {"task": "squad", "data": str(tmp_path / "squad"), "max_length": 32, "warm_start": "blockwise"}
    result = run_stage(task_config(folder, teacher=str(tmp_path / "qa"), max_steps=1, **options), tmp_path / "run")
    assert set(result.metrics) == {"exact_match", "f1"}
    (batch,) = seen
    lengths = batch["attention_mask"].sum(1)
    assert 80 < lengths.sum() <= 100
    assert lengths.tolist() == sorted(lengths.tolist())
    assert batch["token_type_ids"].amax(1).tolist() == [1] * len(lengths)


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


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two steps that ends after its last checkpoint, before it is evaluated."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kron_kernels.distill.trainer.DistillTrainer.evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(task_config(folder, max_steps=2), out)


def test_other_data_and_another_teacher_are_refused_on_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "data", copy / "data")
    shutil.copytree(folder / "teacher" / "model", copy / "teacher" / "model")
    interrupted(copy, tmp_path / "run", monkeypatch)
    config = task_config(copy, max_steps=2)
    train = copy / "data" / "train.tsv"
    lines = train.read_text().splitlines(keepends=True)
    for changed in ([lines[0], *lines[:0:-1]], lines[:-1]):
        train.write_text("".join(changed))
        with pytest.raises(ValueError, match=r"data: .* holds a run with another data"):
            run_stage(config, tmp_path / "run")
    train.write_text("".join(lines))
    teacher = load_model(copy / "teacher" / "model")
    with torch.no_grad():
        teacher.classifier.bias += 0.01
    teacher.save_pretrained(copy / "teacher" / "model")
    with pytest.raises(ValueError, match=r"teacher: .* holds a run with another teacher"):
        run_stage(config, tmp_path / "run")
    teacher.classifier.bias.data -= 0.01
    shutil.copytree(folder / "teacher" / "model", copy / "teacher" / "model", dirs_exist_ok=True)
    # Steps beyond the last are transformers' habit on resuming within an epoch.
    assert run_stage(config, tmp_path / "run").steps == 2


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path) -> None:
    config = task_config(folder, learning_rate=1e30, max_steps=20, save_steps=1, trainer={**QUIET, "max_grad_norm": 0})
    with pytest.raises(FloatingPointError, match=r"step \d+: expected finite losses, got .*; last whole checkpoint: "):
        run_stage(config, tmp_path / "run")


def save_longer(folder: Path, path: Path) -> None:
    """A student with twice the positions."""
    config = transformers.BertConfig.from_pretrained(folder / "bert", max_position_embeddings=64)
    KronBertModel.from_dense(transformers.BertModel(config), "K8").save_pretrained(path)


def test_what_does_not_match_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    def refuse(message: str, **settings: Any) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            run_stage(task_config(folder, **settings), tmp_path / "run")
        assert not (tmp_path / "run").exists(), "a refused run leaves no folder"

    refuse("teacher: expected a model fine-tuned on sst2", teacher=str(folder / "bert"))
    other = transformers.BertConfig(vocab_size=99, **distill_runs.SIZES)
    KronBertModel.from_dense(transformers.BertModel(other), "K8").save_pretrained(tmp_path / "student")
    refuse("student: expected the teacher's vocabulary", student=str(tmp_path / "student"))
    dense = transformers.BertModel.from_pretrained(folder / "bert")
    int8 = {**preset("K8").to_dict(), "version": 2, "weight_dtype": "int8"}
    KronBertModel.from_dense(dense, int8).save_pretrained(tmp_path / "int8")
    refuse("student: expected factors in floating point to train, got int8 ones", student=str(tmp_path / "int8"))
    save_longer(folder, tmp_path / "longer")
    refuse("max_length: expected at most the model's 32, got 64", student=str(tmp_path / "longer"), max_length=64)
    refuse(r"trainer: 'lr_schedule' is no argument of transformers\.", trainer={"lr_schedule": "constant"})
    refuse("trainer: 'save_total_limit' belongs to the run's folder", trainer={"save_total_limit": 1})
    weights = load_file(tmp_path / "longer" / "model.safetensors")
    weights.pop("encoder.layer.0.output.LayerNorm.weight")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "longer" / "model.safetensors", {"format": "pt"})
    refuse(
        "longer: expected every tensor of the encoder, 1 are missing, among them encoder.layer.0.output",
        student=str(tmp_path / "longer"),
    )


def test_settings_pass_through_and_a_longer_student_is_allowed(folder: Path, tmp_path: Path) -> None:
    save_longer(folder, tmp_path / "longer")
    options = {"max_steps": 2, "logging_steps": 1, "trainer": {**QUIET, "lr_scheduler_type": "constant"}}
    run_stage(task_config(folder, student=str(tmp_path / "longer"), **options), tmp_path / "run")
    assert set(losses(tmp_path / "run", "learning_rate")) == {3e-3}
    config = load_model(tmp_path / "run" / "model").config
    assert (config.max_position_embeddings, config.hidden_dropout_prob) == (64, 0)


def test_a_full_disk_is_one_line_before_and_during_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = task_config(folder, max_steps=2, save_steps=1)
    real = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: real._replace(free=20_000))
        with pytest.raises(OSError, match=r"checkpoints: expected 0\.\d+ MB free at .*, got 0.02 MB") as caught:
            run_stage(config, tmp_path / "run")
        assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "run" / "start").is_dir(), "to resume once there is room"

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save", full)
        with pytest.raises(
            OSError, match=r"checkpoints: the disk is full at .*run; make room and run the same"
        ) as caught:
            run_stage(config, tmp_path / "run")
        assert caught.value.errno == errno.ENOSPC
    assert run_stage(config, tmp_path / "run").steps == 2
