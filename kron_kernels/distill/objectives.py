"""The supervised side of each stage: which labels a batch has, what counts, and the loss of the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

# Columns that are no input of a model here: the labels, so that no model computes a loss of its own, and book-keeping.
LABEL_NAMES = ("labels", "next_sentence_label", "start_positions", "end_positions")
IGNORED = -100


class Counts(NamedTuple):
    """What sums over a step are divided by, over all its processes and accumulated batches: tensors of no dimension.

    ``tokens``: real tokens. ``pairs``: the sum of the squares of the sequences' lengths. ``rows``: rows of logits to
    match. ``labels``: labels that are not ignored. ``sequences``: sequences.
    """

    tokens: Tensor
    pairs: Tensor
    rows: Tensor
    labels: Tensor
    sequences: Tensor


class Objective:
    """No labels: an encoder that learns from its teacher's intermediate layers alone."""

    def counts(self, batch: Batch) -> Tensor:
        """Counts of one batch as float32 (5,) on its device, in the order of ``Counts``."""
        mask = attention_mask(batch)
        lengths = mask.sum(1, dtype=torch.float32)
        return torch.stack(
            [
                lengths.sum(),
                lengths.square().sum(),
                self.row_count(batch, mask),
                self.label_count(batch),
                lengths.new_tensor(len(lengths)),
            ]
        )

    def row_count(self, batch: Batch, mask: Tensor) -> Tensor:
        return mask.new_zeros((), dtype=torch.float32)

    def label_count(self, batch: Batch) -> Tensor:
        return batch["input_ids"].new_zeros((), dtype=torch.float32)

    @contextmanager
    def on(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Within, ``model`` computes no logits that would not be used."""
        yield

    def logits(self, outputs: Any) -> Tensor | None:
        """(rows, classes), or (B, L, classes) with ``row_mask``."""
        return None

    def row_mask(self, batch: Batch) -> Tensor | None:
        return None

    def loss(self, outputs: Any, batch: Batch, counts: Counts) -> Tensor | None:
        """The supervised loss of this batch's part of the step."""
        return None


class Classification(Objective):
    """A class for each sequence: cross entropy."""

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels

    def row_count(self, batch: Batch, mask: Tensor) -> Tensor:
        return mask.new_tensor(len(mask), dtype=torch.float32)

    def label_count(self, batch: Batch) -> Tensor:
        return batch["input_ids"].new_tensor(len(batch["labels"]), dtype=torch.float32)

    def logits(self, outputs: Any) -> Tensor:
        return outputs.logits

    def loss(self, outputs: Any, batch: Batch, counts: Counts) -> Tensor:
        return F.cross_entropy(outputs.logits.float(), batch["labels"], reduction="sum") / counts.labels


class Regression(Classification):
    """A number for each sequence: squared error."""

    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, outputs: Any, batch: Batch, counts: Counts) -> Tensor:
        wanted = batch["labels"].float()
        return F.mse_loss(outputs.logits.float().squeeze(-1), wanted, reduction="sum") / counts.labels


class QuestionAnswering(Objective):
    """First and last token of an answer: the mean of two cross entropies, answers outside the window left out."""

    def row_count(self, batch: Batch, mask: Tensor) -> Tensor:
        return mask.sum(dtype=torch.float32)

    def label_count(self, batch: Batch) -> Tensor:
        return batch["input_ids"].new_tensor(len(batch["start_positions"]), dtype=torch.float32)

    def logits(self, outputs: Any) -> Tensor:
        return torch.stack((outputs.start_logits, outputs.end_logits), -1)

    def row_mask(self, batch: Batch) -> Tensor:
        return attention_mask(batch)

    def loss(self, outputs: Any, batch: Batch, counts: Counts) -> Tensor:
        outside = attention_mask(batch) == 0
        total = outputs.start_logits.new_zeros((), dtype=torch.float32)
        for name in ("start", "end"):
            logits = outputs[f"{name}_logits"].float().masked_fill(outside, float("-inf"))
            total = total + F.cross_entropy(logits, batch[f"{name}_positions"], reduction="sum")
        return total / (2 * counts.labels)


class MaskedLanguageModel(Objective):
    """Masked tokens, and whether the second segment follows the first where batches say so: cross entropies.

    Only the masked positions go through the output layer, whose logits are as wide as the vocabulary.
    """

    def row_count(self, batch: Batch, mask: Tensor) -> Tensor:
        return self.label_count(batch)

    def label_count(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).sum(dtype=torch.float32)

    @contextmanager
    def on(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        rows = batch["labels"] != IGNORED

        def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            return (arguments[0][rows],)

        head: Any = model.cls
        handle = head.predictions.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, outputs: Any) -> Tensor:
        return outputs["logits"] if "logits" in outputs else outputs["prediction_logits"]

    def loss(self, outputs: Any, batch: Batch, counts: Counts) -> Tensor:
        wanted = batch["labels"][batch["labels"] != IGNORED]
        total = F.cross_entropy(self.logits(outputs).float(), wanted, reduction="sum") / counts.labels.clamp(min=1)
        if "next_sentence_label" in batch:
            follows = outputs["seq_relationship_logits"].float()
            total = total + F.cross_entropy(follows, batch["next_sentence_label"], reduction="sum") / counts.sequences
        return total


def attention_mask(batch: Batch) -> Tensor:
    """The batch's mask (B, L), ones where it has none."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask
