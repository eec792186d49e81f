"""DistillTrainer: exact counts over accumulated batches and processes, logged terms, evaluation."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification, TrainingArguments

from kron_kernels.distill.losses import LossConfig
from kron_kernels.distill.objectives import Classification, Counts, MaskedLanguageModel
from kron_kernels.distill.trainer import DistillTrainer, TeacherOutputs
from kron_kernels.models import KronBertForPreTraining, KronBertForSequenceClassification
from tests.distill import distill_runs

CONFIG: dict[str, Any] = {"vocab_size": 64, **distill_runs.SIZES, "hidden_dropout_prob": 0.0}
CONFIG["attention_probs_dropout_prob"] = 0.0
TERMS = [f"loss/{term}" for term in ("embedding", "scores", "ffn", "logits", "supervised")]


def rows(count: int) -> list[dict[str, Any]]:
    """Sequences of random length, with a class each."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    found = [torch.randint(5, 64, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": int(ids[0]) % 2} for ids in found]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(BertConfig(**CONFIG)).eval()
    return teacher, KronBertForSequenceClassification.from_dense(teacher, "K8")


def trainer(out: Path, student: Any, teacher: Any, **options: Any) -> DistillTrainer:
    objective = Classification(2)
    settings = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "seed": 0}
    return DistillTrainer(
        model=student,
        args=TrainingArguments(output_dir=str(out), **{**settings, **options}),
        train_dataset=rows(24),
        eval_dataset=rows(10),
        data_collator=collate,
        teacher=TeacherOutputs(teacher, LossConfig(), objective),
        losses=LossConfig(),
        objective=objective,
    )


def logged(one: DistillTrainer, key: str) -> list[float]:
    return [entry[key] for entry in one.state.log_history if key in entry]


def test_loss_is_the_sum_of_its_logged_terms_and_falls(tmp_path: Path) -> None:
    teacher, student = pair()
    before = copy.deepcopy(teacher.state_dict())
    one = trainer(tmp_path, student, teacher, max_steps=12, per_device_train_batch_size=8)
    one.train()
    for step, loss in enumerate(logged(one, "loss")):
        assert loss == pytest.approx(sum(logged(one, term)[step] for term in TERMS), rel=1e-4)
    assert logged(one, "loss/scores")[-1] < 0.9 * logged(one, "loss/scores")[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    metrics = one.evaluate()
    assert metrics["eval/loss"] == pytest.approx(sum(metrics[f"eval/{term}"] for term in TERMS), rel=1e-4)


@pytest.mark.slow
def test_accumulated_batches_give_the_loss_and_the_step_of_the_whole(tmp_path: Path) -> None:
    teacher, student = pair()
    other = copy.deepcopy(student)
    whole = trainer(tmp_path, student, teacher, per_device_train_batch_size=8)
    cut = trainer(tmp_path, other, teacher, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    cut.train()
    for key in ("loss", *TERMS):
        assert logged(cut, key) == pytest.approx(logged(whole, key), rel=1e-4)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], atol=1e-5, rtol=1e-3)


def test_masked_language_model_computes_logits_of_masked_positions_only() -> None:
    torch.manual_seed(0)
    teacher = BertForPreTraining(BertConfig(**CONFIG)).eval()
    student = KronBertForPreTraining.from_dense(teacher, "K8")
    ids = torch.randint(5, 64, (3, 9))
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[2, 5] = 7, 9
    batch = {"input_ids": ids, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
    objective = MaskedLanguageModel()
    counts = Counts(*objective.counts(batch))
    assert [int(count) for count in counts] == [27, 3 * 81, 2, 2, 3]
    for model in (teacher, student):
        with torch.no_grad():
            everywhere = model(input_ids=ids)
            with objective.on(model, batch):
                outputs = model(input_ids=ids)
        assert objective.logits(outputs).shape == (2, 64)
        torch.testing.assert_close(objective.logits(outputs), everywhere.prediction_logits[labels != -100])
        wanted = model(input_ids=ids, labels=labels, next_sentence_label=batch["next_sentence_label"]).loss
        torch.testing.assert_close(objective.loss(outputs, batch, counts), wanted)


WORKER = """
import json, sys, torch
from accelerate import PartialState
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.distill.test_trainer import TERMS, pair, trainer, logged
teacher, student = pair()
one = trainer(Path(sys.argv[1]), student, teacher, per_device_train_batch_size=4, ddp_backend="gloo")
one.train()
if one.is_world_process_zero():
    result = {{key: logged(one, key) for key in ("loss", *TERMS)}}
    Path(sys.argv[1], "result.json").write_text(json.dumps(result))
one.accelerator.wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    teacher, student = pair()
    one = trainer(tmp_path / "one", student, teacher, per_device_train_batch_size=8)
    one.train()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[2])), encoding="utf-8")
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    for key in ("loss", *TERMS):
        assert two[key] == pytest.approx(logged(one, key), rel=1e-4)
