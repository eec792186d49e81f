"""The stages of a distillation as one call each: from folders of models and data to a run folder with the result."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..compress.files import check_space, new_folder
from ..convert.counting import count_parameters
from .callbacks import RunLogger, check_finite
from .config import DistillConfig
from .run_folder import RunFolder
from .run_result import RunResult
from .student import set_dropout
from .teacher import TeacherOutputs
from .trainer import DistillTrainer
from .work import Work, prepare_pretraining, prepare_task

Progress = Callable[[int, int, str], None]
# Complete checkpoints that stay.
_KEPT = 2
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_stage(
    config: DistillConfig, out: str | os.PathLike[str], *, resume: bool | None = None, progress: Progress | None = None
) -> RunResult:
    """Carry out one stage and leave everything in the folder ``out``; see ``RunFolder`` for what is there.

    A run that was interrupted goes on from its last whole checkpoint when it is called again with the same
    configuration; one that is finished returns its result. One that is refused before it trains leaves nothing, unless
    the folder held a run before or the disk is full. Works in several processes under ``torchrun`` or
    ``accelerate launch``, as any program on transformers' Trainer.

    Args:
        config: what to do.
        out: the run's folder.
        resume: True insists on an existing run, False on a new one; None takes either.
        progress: called as ``progress(done, total, what)`` while a student is made; training has the Trainer's bar.

    Raises:
        ValueError: models that do not match, data that does not suit the task, a folder of another run.
        OSError: a model or data that cannot be read, a full disk.
        FloatingPointError: a loss that is not finite.
    """
    folder = _open(config, out, resume)
    if folder.result is not None:
        return folder.result
    try:
        work, trainer = _prepare(config, folder, progress)
    except (ValueError, TypeError, OSError, RuntimeError) as refusal:
        # A run without room is the one to go on with once there is some.
        if getattr(refusal, "errno", None) != errno.ENOSPC:
            folder.discard()
        raise
    checkpoint = folder.last_checkpoint()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # The result is what the saved model does: not in the precision of the training.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    metrics = trainer.evaluate()
    result = _result(work, trainer, metrics, folder)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered where they are sharded
    if trainer.is_world_process_zero():
        with new_folder(folder.model_path) as model:
            work.student.save_pretrained(model, state_dict=weights)
            work.tokenizer.save_pretrained(model)
        folder.finish(result)
    trainer.accelerator.wait_for_everyone()
    return result


def _open(config: DistillConfig, out: str | os.PathLike[str], resume: bool | None) -> RunFolder:
    """The run's folder: made by the first process, found by the others."""
    state = PartialState()
    folder = RunFolder.create(out, config.to_dict(), resume) if state.is_main_process else None
    state.wait_for_everyone()
    return folder or RunFolder(out)


def _prepare(config: DistillConfig, folder: RunFolder, progress: Progress | None) -> tuple[Work, DistillTrainer]:
    prepare = prepare_pretraining if config.stage == "pretrain" else prepare_task
    work = prepare(config, folder, progress)
    if work.config.dropout is not None:
        set_dropout(work.student, work.config.dropout)
    check_space(folder.path, _space(work.student, len(folder.complete_checkpoints())), "checkpoints")
    return work, _trainer(work, folder)


def _space(student: torch.nn.Module, present: int) -> int:
    """Bytes that are still to be written, at most: the checkpoints kept, one more before a kept one goes, the model.

    Each checkpoint holds float32 weights and Adam's two moments; ``present`` of them are on the disk already.
    """
    weights = 4 * count_parameters(student)
    return weights * (3 * (_KEPT + 1 - min(present, _KEPT)) + 1)


def _trainer(work: Work, folder: RunFolder) -> DistillTrainer:
    config = work.config
    return DistillTrainer(
        model=work.student,
        args=_arguments(config, folder),
        train_dataset=work.train,
        eval_dataset=work.evaluation,
        data_collator=work.collator,
        processing_class=work.tokenizer,
        teacher=_teacher(work),
        losses=config.losses,
        objective=work.objective,
        scores=work.scores,
        on_terms=lambda terms, step: check_finite(terms, step, folder),
        callbacks=[RunLogger(folder, _KEPT)],
    )


def _teacher(work: Work) -> TeacherOutputs | None:
    config = work.config
    if work.teacher is None:
        return None
    autocast = _DTYPES[config.teacher_precision or config.precision]
    return TeacherOutputs(work.teacher, config.losses, work.objective, autocast)


def _arguments(config: DistillConfig, folder: RunFolder) -> TrainingArguments:
    """transformers' arguments of a run; ``config.trainer`` has the last word."""
    settings: dict[str, Any] = {
        "output_dir": str(folder.checkpoints_path),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "save_steps": config.save_steps,
        "logging_steps": config.logging_steps,
        # A loss that is not finite ends the run.
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length" if config.stage != "pretrain" else "random",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    unknown = sorted(set(config.trainer) - set(TrainingArguments.__dataclass_fields__))
    if unknown:
        raise ValueError(f"trainer: {unknown[0]!r} is no argument of transformers.TrainingArguments")
    return TrainingArguments(**{**settings, **config.trainer})


def _result(work: Work, trainer: DistillTrainer, metrics: dict[str, float], folder: RunFolder) -> RunResult:
    config = work.config
    # Those of training, over all its starts.
    seconds = max((record.get("seconds", 0.0) for record in folder.metrics()), default=0.0)
    found = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    score = found.get(work.task.main) if work.task is not None else None
    return RunResult(
        kind=config.stage,
        name=config.name or work.preset or "teacher",
        variant=config.variant,
        task=work.name,
        metrics=found,
        score=score,
        teacher_score=work.teacher_score,
        parameters=count_parameters(work.student),
        teacher_parameters=None if work.teacher is None else count_parameters(work.teacher),
        seed=config.seed,
        steps=trainer.state.global_step,
        seconds=seconds,
        peak_memory_bytes=folder.peak_memory_bytes,
        train_tokens=round(trainer.state.epoch * sum(work.train["length"])),
    )
