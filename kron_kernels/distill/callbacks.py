"""What ties transformers' Trainer to a run's folder, and the guard against losses that are not finite."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .curves import write_curves
from .run_folder import RunFolder

# What evaluation and the end of training put before their metrics, and what the files have instead.
_PREFIXES = {"eval_": "eval/", "train_": "train/"}


class RunLogger(TrainerCallback):
    """Writes what the Trainer logs to the run's ``metrics.jsonl`` and looks after its checkpoints.

    Logged are whatever ``Trainer.log`` is given, evaluations included, with ``step``, ``epoch`` and the ``seconds`` of
    training so far, those before an interruption included. ``eval_accuracy`` becomes ``eval/accuracy``.

    Args:
        run: made by :meth:`RunFolder.create`.
        keep: complete checkpoints to keep, beside the best.

    Raises:
        ValueError: at the beginning of training, where the Trainer's ``output_dir`` is not the run's
            ``checkpoints_path``, or ``save_total_limit`` is set (see :class:`RunFolder`).
    """

    def __init__(self, run: RunFolder, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self._run = run
        self._keep = keep
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the folder back to the step at which training starts."""
        wanted = self._run.checkpoints_path
        if Path(args.output_dir or "").resolve() != wanted.resolve():
            raise ValueError(f"output_dir: expected the run's {wanted}, got {args.output_dir}")
        if (limit := args.save_total_limit) is not None:
            raise ValueError(f"save_total_limit: expected None, the run keeps {self._keep} itself, got {limit}")
        step = state.global_step
        self._run.rewind(self._checkpoint(step) if step else None)
        before = max((record.get("seconds", 0.0) for record in self._run.metrics()), default=0.0)
        self._start = time.monotonic() - before

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if state.is_world_process_zero and logs:
            values = {_name(key): value for key, value in logs.items() if key != "epoch"}
            seconds = round(time.monotonic() - self._start, 3)
            self._run.log({"step": state.global_step, "epoch": state.epoch, "seconds": seconds, **values})
            self._run.note_memory()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written as complete, and delete what is not to be kept."""
        if state.is_world_process_zero:
            self._run.mark_complete(self._checkpoint(state.global_step))
            self._run.note_memory()
            self._run.prune(self._keep, state.best_model_checkpoint)
            write_curves(self._run)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the curves."""
        if state.is_world_process_zero:
            write_curves(self._run)

    def _checkpoint(self, step: int) -> Path:
        return self._run.checkpoints_path / f"{PREFIX_CHECKPOINT_DIR}-{step}"


class NonFiniteLossError(FloatingPointError, RuntimeError):
    """A loss became NaN or infinite. A RuntimeError too, so that the command line reports it in one line."""


def check_finite(terms: Mapping[str, Tensor], step: int, run: RunFolder | None = None) -> None:
    """Stop a training whose loss is not finite.

    All terms are looked at together: on a GPU that waits for it once.

    Args:
        terms: loss term -> scalar tensor, any dtype and device.
        step: the step at hand, for the message.
        run: its last complete checkpoint is named.

    Raises:
        NonFiniteLossError: names the step, the first term that is NaN or infinite, and the checkpoint.
    """
    if not terms:
        return
    values = torch.stack([term.detach().float().reshape(()) for term in terms.values()])
    if bool(values.isfinite().all()):
        return
    name, value = next((name, float(term)) for name, term in terms.items() if not bool(term.isfinite()))
    last = run.last_checkpoint() if run is not None else None
    hint = f"last complete checkpoint: {last}" if last is not None else "no checkpoint was saved before"
    raise NonFiniteLossError(f"step {step}: expected finite losses, got {value} for {name}; {hint}")


def _name(key: str) -> str:
    for prefix, instead in _PREFIXES.items():
        if key.startswith(prefix):
            return instead + key.removeprefix(prefix)
    return key
