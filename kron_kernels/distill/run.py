"""The stages of a distillation as one call each: from folders of models and data to a run folder with the result."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..compress.files import NoSpaceError, check_space, new_folder
from ..convert.calibrate import Progress
from ..convert.counting import count_parameters
from .config import DistillConfig
from .curves import write_curves
from .prepare import Work, prepare_pretraining, prepare_task
from .run_folder import RunFolder, RunResult, mark_complete, rows_fingerprint, weights_fingerprint
from .student import set_dropout
from .trainer import DistillTrainer, TeacherOutputs

_KEPT = 2  # checkpoints that stay: transformers deletes an older one before the newest has its marker
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_stage(
    config: DistillConfig, out: str | os.PathLike[str], *, resume: bool | None = None, progress: Progress | None = None
) -> RunResult:
    """Carry out one stage and leave everything in the folder ``out``; see ``RunFolder`` for what is there.

    A run that was interrupted resumes from its last whole checkpoint when it is called again with the same
    configuration, data and teacher; one that is finished returns its result. One that raises before it trains
    leaves nothing, unless the folder held a run before or the disk is full. Works in several processes under
    ``torchrun`` or ``accelerate launch``, as any program on transformers' Trainer.

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
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # A run without room can be resumed once there is some.
        if getattr(error, "errno", None) != errno.ENOSPC:
            folder.discard()
        raise
    with _disk_errors(folder):
        train(trainer, folder)
        # The result is what the saved model does: not in the precision of the training.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        metrics = trainer.evaluate()
        result = _result(work, trainer, metrics)
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered where they are sharded
        if trainer.is_world_process_zero():
            with new_folder(folder.model_path) as model:
                work.student.save_pretrained(model, state_dict=weights)
                work.tokenizer.save_pretrained(model)
            write_curves(trainer.state.log_history, folder.path)
            folder.finish(result, trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return result


class NonFiniteLossError(FloatingPointError, RuntimeError):
    """A loss became NaN or infinite. A RuntimeError too, so that the command line reports it in one line."""


class RunCallback(TrainerCallback):
    """Mark whole checkpoints, and log ``seconds`` and ``peak_memory_bytes``, those before a kill included."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._began = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock at the seconds of the last checkpoint."""
        self._began = time.monotonic() - logged_most(state.log_history, "seconds")

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Add to the entry that was just logged."""
        seconds = time.monotonic() - self._began if self._began else logged_most(state.log_history, "seconds")
        peak = max(_peak_memory(), int(logged_most(state.log_history, "peak_memory_bytes")))
        state.log_history[-1] |= {"seconds": round(seconds, 3), "peak_memory_bytes": peak}

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written, and draw the curves so far."""
        if state.is_world_process_zero:
            mark_complete(self._folder.checkpoints_path / f"checkpoint-{state.global_step}")
            write_curves(state.log_history, self._folder.path)


def logged_most(log: list[dict[str, Any]], name: str) -> float:
    """Give the largest value of that name in a log, 0 where there is none."""
    return max((entry.get(name) or 0.0 for entry in log), default=0.0)


def _open(config: DistillConfig, out: str | os.PathLike[str], resume: bool | None) -> RunFolder:
    """The run's folder: made by the first process, found by the others."""
    state = PartialState()
    folder = RunFolder.create(out, config.to_dict(), resume) if state.is_main_process else None
    state.wait_for_everyone()
    return folder or RunFolder(out)


def _prepare(config: DistillConfig, folder: RunFolder, progress: Progress | None) -> tuple[Work, DistillTrainer]:
    prepare = prepare_pretraining if config.stage == "pretrain" else prepare_task
    work = prepare(config, folder, progress)
    if PartialState().is_main_process:
        folder.identify(data=rows_fingerprint(work.train, work.evaluation))
        if work.teacher is not None:
            folder.identify(teacher=weights_fingerprint(work.teacher))
        folder.rewind()
    PartialState().wait_for_everyone()
    if work.config.dropout is not None:
        set_dropout(work.student, work.config.dropout)
    # Checkpoints of float32 weights and Adam's two moments, one more before a kept one goes, and the model.
    present = sum(path.stat().st_size for path in folder.checkpoints_path.rglob("*"))
    needed = 4 * count_parameters(work.student) * (3 * (_KEPT + 1) + 1)
    check_space(folder.path, needed - present, "checkpoints")
    return work, _trainer(work, folder)


def train(trainer: Trainer, folder: RunFolder) -> None:
    """Train from the last checkpoint; one of the last step is taken as it is, where transformers would add a step."""
    last = get_last_checkpoint(str(folder.checkpoints_path)) if folder.checkpoints_path.is_dir() else None
    if last is not None:
        state = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(last)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=last)


def _trainer(work: Work, folder: RunFolder) -> DistillTrainer:
    config, teacher = work.config, None
    if work.teacher is not None:
        autocast = _DTYPES[config.teacher_precision or config.precision]
        teacher = TeacherOutputs(work.teacher, config.losses, work.objective, autocast)
    return DistillTrainer(
        model=work.student,
        args=_arguments(config, folder),
        train_dataset=work.train,
        eval_dataset=work.evaluation,
        data_collator=work.collator,
        processing_class=work.tokenizer,
        teacher=teacher,
        losses=config.losses,
        objective=work.objective,
        scores=work.scores,
        on_terms=lambda terms, step: _check_finite(terms, step, folder),
        callbacks=[RunCallback(folder)],
    )


def trainer_settings(folder: RunFolder) -> dict[str, Any]:
    """Give the fields of TrainingArguments that every run in a folder shares."""
    return {
        "output_dir": str(folder.checkpoints_path),
        "save_total_limit": _KEPT,
        # A loss that is not finite ends the run.
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _arguments(config: DistillConfig, folder: RunFolder) -> TrainingArguments:
    """transformers' arguments of a run; ``config.trainer`` has the last word."""
    settings: dict[str, Any] = {
        **trainer_settings(folder),
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
        "train_sampling_strategy": "group_by_length" if config.stage != "pretrain" else "random",
    }
    unknown = sorted(set(config.trainer) - set(TrainingArguments.__dataclass_fields__))
    if unknown:
        raise ValueError(f"trainer: {unknown[0]!r} is no argument of transformers.TrainingArguments")
    fixed = sorted({"output_dir", "save_total_limit"} & set(config.trainer))
    if fixed:
        raise ValueError(f"trainer: {fixed[0]!r} belongs to the run's folder; leave it out")
    return TrainingArguments(**{**settings, **config.trainer})


def _check_finite(terms: dict[str, torch.Tensor], step: int, folder: RunFolder) -> None:
    """Stop a training whose loss is not finite; all terms are looked at together, so a GPU is waited for once."""
    values = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
    if bool(values.isfinite().all()):
        return
    name, value = next((name, float(term)) for name, term in terms.items() if not bool(term.isfinite()))
    last = folder.last_checkpoint()
    hint = f"last whole checkpoint: {last}" if last is not None else "no checkpoint was saved before"
    raise NonFiniteLossError(f"step {step}: expected finite losses, got {value} for {name}; {hint}")


@contextmanager
def _disk_errors(folder: RunFolder) -> Iterator[None]:
    """Turn what torch, pickle and safetensors raise for a full disk or a damaged file into an OSError of one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full or shutil.disk_usage(folder.path).free < 1 << 20:
            raise NoSpaceError(
                f"checkpoints: the disk is full at {folder.path}; make room and run the same command again"
            ) from error
        if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
            raise OSError(f"checkpoints: {folder.checkpoints_path} cannot be read or written: {error}") from error
        raise


def _peak_memory() -> int:
    """Bytes: of the GPU's allocator where there is one, else the largest resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _result(work: Work, trainer: DistillTrainer, metrics: dict[str, float]) -> RunResult:
    config, log = work.config, trainer.state.log_history
    found = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    return RunResult(
        kind=config.stage,
        name=config.name or work.preset or "teacher",
        variant=config.variant,
        task=work.name,
        metrics=found,
        score=found.get(work.task.main) if work.task is not None else None,
        teacher_score=work.teacher_score,
        parameters=count_parameters(work.student),
        teacher_parameters=None if work.teacher is None else count_parameters(work.teacher),
        seed=config.seed,
        steps=trainer.state.global_step,
        seconds=logged_most(log, "seconds"),
        peak_memory_bytes=int(logged_most(log, "peak_memory_bytes")),
        train_tokens=round((trainer.state.epoch or 0.0) * sum(work.train["length"])),
    )
