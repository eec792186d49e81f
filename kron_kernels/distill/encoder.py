"""Label-free distillation of a sentence encoder: the student learns the teacher's sentence vectors and how they relate.

Nothing but plain sentences is needed. The teacher's vectors are computed once, before the training, and kept in the
run's folder. For a batch of B sentences with unit vectors t (teacher) and z (student) the loss is the mean of
``1 - t_i . z_i``, plus ``RELATION`` times the mean squared difference of the similarities ``t t^T`` and ``z z^T`` (B,
B), plus ``NEIGHBOURS`` times the KL divergence of each sentence's softmax over its similarities to the others, which
weighs the nearest ones most.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from ..compress.files import write_bytes
from ..convert.agreement import mean_pool
from ..convert.calibrate import Progress
from .run import NonFiniteLossError, RunCallback, logged_most, train, trainer_settings
from .run_folder import RunFolder, rows_fingerprint, weights_fingerprint
from .student import set_dropout

RELATION, NEIGHBOURS, TEMPERATURE = 20.0, 0.3, 0.05
_VECTORS = "teacher-vectors.bin"
_TIMED_STEPS = 6  # steps that estimate how many fit into a number of minutes


@dataclass(frozen=True)
class EncoderResult:
    """What a distillation came to: steps, seconds, and the mean loss of its last tenth of steps."""

    steps: int
    seconds: float
    loss: float


def sentence_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of unit vectors (B, d) of both models: their cosines, similarities and nearest neighbours."""
    cosine = 1 - (student * teacher).sum(-1).mean()
    ours, theirs = student @ student.T, teacher @ teacher.T
    relation = (ours - theirs).square().mean()
    itself = torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    ours, theirs = ((each / TEMPERATURE).masked_fill(itself, -1e4).log_softmax(-1) for each in (ours, theirs))
    neighbours = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return cosine + RELATION * relation + NEIGHBOURS * neighbours


@torch.inference_mode()
def encode(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    pad: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Tensor:
    """Compute the pooled vectors (N, d), float32, of token ids; sentences of like length share a batch."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _padded([rows[index] for index in chosen], pad)
        pooled = mean_pool(model(**batch).last_hidden_state, batch["attention_mask"]).float()
        for index, vector in zip(chosen, pooled, strict=True):
            vectors[index] = vector
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order), "sentence vectors")
    return torch.stack(vectors)


def distill_encoder(
    teacher: Any,
    student: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    out: str | os.PathLike[str],
    *,
    minutes: float = 5.0,
    max_steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    max_length: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Any, EncoderResult]:
    """Train ``student`` in place to give the sentence vectors of ``teacher``, by transformers' Trainer.

    Args:
        teacher, student: encoders whose call returns ``last_hidden_state``, of equal width; mean pooling is applied. A
            function instead of a student makes and returns it, once it is given the folder to keep it in.
        sentences: at least two batches of text; duplicates and blank lines are dropped.
        out: folder of the run (``RunFolder``). One that was interrupted resumes from its last whole checkpoint.
        minutes: training time; the number of steps that fits is estimated from a few steps. Ignored with ``max_steps``.
        batch_size, learning_rate, max_length, seed: sentences a step, peak of the cosine schedule, tokens a sentence.
        progress: called as ``progress(done, total, what)`` before the training, which has the Trainer's bar.

    Returns the trained student, in evaluation mode, and what it came to.

    Raises:
        ValueError: too little text, widths that differ, a folder of a run on other text, models or settings.
        NonFiniteLossError: a loss that is not finite.
    """
    texts = list(dict.fromkeys(text.strip() for text in sentences if text.strip()))
    if len(texts) < 2 * batch_size:
        raise ValueError(f"sentences: expected at least {2 * batch_size} different ones, got {len(texts)}")
    settings = {"max_steps": max_steps} if max_steps else {"minutes": minutes}
    settings |= {"batch_size": batch_size, "learning_rate": learning_rate, "max_length": max_length, "seed": seed}
    folder = RunFolder.create(out, {"stage": "encoder", **settings})
    try:
        folder.identify(data=rows_fingerprint(texts), teacher=weights_fingerprint(teacher))
        if not isinstance(student, nn.Module):
            student = student(folder.start_path)
        widths = teacher.config.hidden_size, student.config.hidden_size
        if widths[0] != widths[1]:
            raise ValueError(f"student: expected the teacher's hidden size {widths[0]}, got {widths[1]}")
        folder.identify(student=weights_fingerprint(student))
    except (ValueError, OSError):
        folder.discard()
        raise
    folder.rewind()
    set_dropout(student, 0.0)  # what it is to reproduce has none
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    pad = tokenizer.pad_token_id or 0
    vectors = _teacher_vectors(folder, teacher, rows, pad, progress)
    data = [{"input_ids": row, "teacher": vector} for row, vector in zip(rows, vectors, strict=True)]
    # A run that resumes keeps the number of steps, and with it the schedule, that it began with.
    steps = folder.identity.get("steps") or max_steps or _steps_within(60 * minutes, student, data, batch_size, pad)
    folder.identify(steps=steps)
    arguments = TrainingArguments(
        **trainer_settings(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 25),
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        seed=seed,
        train_sampling_strategy="group_by_length",
        save_steps=max(50, steps // 5),
        logging_steps=max(1, steps // 10),
    )
    trainer = EncoderTrainer(
        model=student,
        args=arguments,
        train_dataset=data,
        data_collator=lambda batch: _collate(batch, pad),
        callbacks=[RunCallback(folder)],
    )
    train(trainer, folder)
    student.eval()
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return student, EncoderResult(trainer.state.global_step, logged_most(log, "seconds"), losses[-1])


def _teacher_vectors(
    folder: RunFolder, teacher: nn.Module, rows: Sequence[Sequence[int]], pad: int, progress: Progress | None
) -> Tensor:
    """The teacher's vectors (N, d) of all rows, computed once in a run; the file begins with the hash of the rest."""
    path = folder.path / _VECTORS
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content[32:]).digest() == content[:32]:
        return load(content[32:])["vectors"]
    vectors = encode(teacher.eval(), rows, pad, progress=progress)
    content = save({"vectors": vectors})
    write_bytes(path, hashlib.sha256(content).digest() + content)
    return vectors


class EncoderTrainer(Trainer):
    """transformers' Trainer with ``sentence_loss``; batches hold the teacher's vectors as ``teacher`` (B, d)."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch; NonFiniteLossError where it is not finite."""
        teacher = inputs.pop("teacher")
        outputs = model(**inputs)
        loss = sentence_loss(mean_pool(outputs.last_hidden_state, inputs["attention_mask"]), teacher)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"loss: expected a finite number, got {loss.item()}; lower the learning rate")
        return (loss, outputs) if return_outputs else loss


def _steps_within(seconds: float, student: nn.Module, data: Sequence[dict[str, Any]], size: int, pad: int) -> int:
    """Estimate how many steps take ``seconds``, by forward and backward passes that change no weight."""
    ordered = sorted(data, key=lambda row: len(row["input_ids"]))
    student.train()
    times = []
    for step in range(_TIMED_STEPS):
        # Batches of like lengths, as in training: the shortest ones to the longest.
        start = (len(ordered) - size) * step // (_TIMED_STEPS - 1)
        batch = _collate(ordered[start : start + size], pad)
        began = time.perf_counter()
        target = batch.pop("teacher")
        sentence_loss(mean_pool(student(**batch).last_hidden_state, batch["attention_mask"]), target).backward()
        times.append(time.perf_counter() - began)
        student.zero_grad(set_to_none=True)
    # The first step warms up; the optimizer's own work is some tenth of a step.
    return max(1, int(seconds / (1.1 * sum(times[1:]) / (len(times) - 1))))


def _collate(batch: Sequence[dict[str, Any]], pad: int) -> dict[str, Tensor]:
    padded = _padded([row["input_ids"] for row in batch], pad)
    return {**padded, "teacher": torch.stack([row["teacher"] for row in batch])}


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Token ids (B, longest) and their attention mask."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}
