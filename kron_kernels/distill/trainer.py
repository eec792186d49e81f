"""DistillTrainer: transformers' Trainer with a teacher, the distillation losses and exact counts over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers import __version__ as version

from .hidden_states import Captured, capture
from .losses import LossConfig, Normalizers, distillation_losses
from .objectives import LABEL_NAMES, Batch, Counts, Objective, attention_mask

Terms = dict[str, Tensor]
# Batches may carry what is no input of a model: its labels, their lengths.
_NO_INPUTS = (*LABEL_NAMES, "length")


class TeacherOutputs:
    """A frozen model in evaluation mode, called as ``outputs(arguments, batch)``, without gradients.

    Returns what the losses need of the teacher: its ``Captured`` activations and its logits, None for a model without
    a head. ``autocast`` computes it in that dtype.
    """

    def __init__(
        self, model: Any, losses: LossConfig, objective: Objective, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._losses = losses
        self._objective = objective
        self._autocast = autocast

    @torch.no_grad()
    def __call__(self, arguments: Mapping[str, Tensor], batch: Batch) -> tuple[Captured, Tensor | None]:
        """Run the teacher on a batch."""
        device = attention_mask(batch).device.type
        with (
            self._objective.on(self.model, batch),
            capture(self.model, **self._losses.capture_options()) as tape,
            torch.autocast(device, self._autocast, enabled=self._autocast is not None),
        ):
            outputs = self.model(**arguments)
        return tape.take(), self._objective.logits(outputs)


class DistillTrainer(Trainer):
    """Trains a student on the unweighted sum of KroneckerBERT's losses (Tahaei et al., eq. 14), or as ``losses`` says.

    Every term is a mean over the tokens, pairs of tokens, rows or labels of the whole step: of all processes and all
    accumulated batches together. So the loss does not depend on how a batch is cut up. Logs hold the terms as
    ``loss/embedding``, ``loss/scores``, ``loss/ffn``, ``loss/logits`` and ``loss/supervised``.

    Args:
        teacher: answers for a batch (see ``TeacherOutputs``); None trains on the labels alone.
        losses: weights and forms of the terms.
        objective: what the labels are; none by default.
        scores: called with the model by ``evaluate``; returns metrics by name. None computes the losses on the
            ``eval_dataset``.
        on_terms: called as ``on_terms(terms, step)`` after every forward of training.
        **kwargs: those of ``transformers.Trainer``.
    """

    # compute_loss divides by the counts of all accumulated batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        teacher: TeacherOutputs | None = None,
        losses: LossConfig | None = None,
        objective: Objective | None = None,
        scores: Callable[[nn.Module], Mapping[str, float]] | None = None,
        on_terms: Callable[[Terms, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise RuntimeError(f"transformers: expected a Trainer with loss_is_scaled_for_ga, got {version}")
        super().__init__(*args, **kwargs)
        self._teacher = teacher
        self._losses = losses or LossConfig()
        self._objective = objective or Objective()
        self._scores = scores
        self._on_terms = on_terms
        self._sums: Terms = {}
        self._summed_from = 0  # step
        if teacher is not None:
            teacher.model.to(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the batches of one step, and its ``Counts`` in place of transformers' number of labels."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._counts(batches, device) if batches else None

    def _counts(self, batches: list[Any], device: torch.device) -> Counts:
        totals = torch.stack([self._objective.counts(batch) for batch in batches]).sum(0).to(device)
        # Gradients, and losses in logs, are averaged over the processes: each divides by its share of the whole.
        return Counts(*cast(Tensor, self.accelerator.reduce(totals, "mean")))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the weighted sum of the terms; ``num_items_in_batch`` are the step's ``Counts`` or None."""
        counts = num_items_in_batch if num_items_in_batch is not None else self._counts([inputs], self.args.device)
        terms, outputs = self._terms(model, inputs, counts)
        if model.training:
            if self._on_terms is not None:
                self._on_terms(terms, self.state.global_step)
            if not self._sums:
                self._summed_from = self.state.global_step
            for name, value in terms.items():
                detached = value.detach()
                self._sums[name] = self._sums[name] + detached if name in self._sums else detached
        return (terms["loss"], outputs) if return_outputs else terms["loss"]

    def _terms(self, model: nn.Module, inputs: Any, counts: Counts) -> tuple[Terms, Any]:
        arguments = {name: value for name, value in inputs.items() if name not in _NO_INPUTS}
        student: Any = self.accelerator.unwrap_model(model)
        captured: Captured | None = None
        with ExitStack() as stack:
            stack.enter_context(self._objective.on(student, inputs))
            tape = stack.enter_context(capture(student, **self._losses.capture_options())) if self._teacher else None
            outputs = model(**arguments)
            if tape is not None:
                captured = tape.take()
        supervised = self._objective.loss(outputs, inputs, counts)
        if self._teacher is None or captured is None:
            assert supervised is not None, "a student learns from labels or from a teacher"
            return {"loss": supervised, "supervised": supervised}, outputs
        wanted, wanted_logits = self._teacher(arguments, inputs)
        generator = None
        if self._losses.layers is not None:
            # The same layers in every process and after a resume.
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        terms = distillation_losses(
            self._losses,
            captured,
            wanted,
            attention_mask(inputs),
            self._objective.logits(outputs),
            wanted_logits,
            row_mask=self._objective.row_mask(inputs),
            supervised=supervised,
            normalizers=Normalizers(counts.tokens, counts.pairs, counts.rows),
            generator=generator,
            heads=student.config.num_attention_heads,
        )
        return terms, outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers, with the terms of the loss, averaged over the steps and processes behind them."""
        if "loss" in logs and self._sums:
            steps = self.state.global_step - self._summed_from
            names = [name for name in self._sums if name != "loss"]
            means: Any = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]) / steps, "mean")
            logs.update({f"loss/{name}": float(mean) for name, mean in zip(names, means, strict=True)})
            self._sums = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute metrics of the model: those of ``scores``, or the terms of the loss on the evaluation data."""
        model: Any = self.model
        model.eval()
        found = self._scores(self.accelerator.unwrap_model(model)) if self._scores else self._losses_on(eval_dataset)
        model.train()
        metrics = {f"{metric_key_prefix}/{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _losses_on(self, eval_dataset: Any) -> dict[str, float]:
        sums: Terms = {}
        batches = 0
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                terms, _ = self._terms(self.model_wrapped, inputs, self._counts([inputs], self.args.device))
            sums = {name: sums.get(name, torch.zeros_like(value)) + value for name, value in terms.items()}
            batches += 1
        return {name if name == "loss" else f"loss/{name}": float(value) / batches for name, value in sums.items()}
