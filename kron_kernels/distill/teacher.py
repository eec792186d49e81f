"""What a teacher says about a batch, computed without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .hidden_states import Captured, capture
from .losses import LossConfig
from .objectives import Batch, Objective, attention_mask


class TeacherOutputs:
    """A frozen model in evaluation mode, called as ``outputs(arguments, batch)``.

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

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, arguments: Mapping[str, Tensor], batch: Batch) -> tuple[Captured, Tensor | None]:
        device = attention_mask(batch).device.type
        with (
            self._objective.on(self.model, batch),
            capture(self.model, **self._losses.capture_options()) as tape,
            torch.autocast(device, self._autocast, enabled=self._autocast is not None),
        ):
            outputs = self.model(**arguments)
        return tape.take(), self._objective.logits(outputs)
