"""The scores of a task's predictions, in percent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .squad import squad_scores
from .tasks import Task, get_task


def compute_metrics(task: str | Task, predictions: Any, references: Any) -> dict[str, float]:
    """The task's metrics in percent: 100 is a perfect score, and also a correlation of 1.

    Accuracy; F1 of the class of index 1; Matthews' correlation; Pearson's and Spearman's correlation (ties get their
    mean rank); exact match and F1 of texts for question answering (:func:`~.squad.squad_scores`). Predictions that are
    all equal correlate with nothing: their Matthews', Pearson's and Spearman's correlation is 0, not NaN. All but
    question answering is computed in float64.

    Args:
        task: a task or its name.
        predictions: for a classification indices of classes (N,) or logits (N, classes); for a regression (N,) or
            (N, 1); tensors, arrays or lists. For question answering texts by id.
        references: indices (N,), scores (N,), or rows with ``id`` and ``answers``.

    Raises ValueError for lengths that differ, none at all, values that are not finite, indices of no class, F1 of more
    or fewer than two classes, and metrics that references of one class or one value leave undefined (all but accuracy).
    """
    task = get_task(task)
    if task.kind == "qa":
        answers = cast("Mapping[str, str]", predictions)
        scores = squad_scores(answers, cast("Iterable[Mapping[str, Any]]", references))
        return {name: scores[name] for name in task.metrics}
    guesses, truth = _tensor(predictions), _tensor(references)
    if len(guesses) != len(truth) or not len(truth):
        raise ValueError(
            f"predictions: expected as many as references, and at least one, got {len(guesses)} for {len(truth)}"
        )
    for name, values in (("predictions", guesses), ("references", truth)):
        if bad := int((~torch.isfinite(values)).sum()):
            raise ValueError(f"{name}: expected finite numbers, got {bad} of {values.numel()} that are not")
    if task.kind == "classification":
        guesses, truth = _classes(task, guesses), _classes(task, truth, "references")
        return {name: _classification(task, name, guesses, truth) for name in task.metrics}
    if guesses.shape not in (truth.shape, (*truth.shape, 1)):
        raise ValueError(f"predictions: expected shape ({len(truth)},), got {tuple(guesses.shape)}")
    return {name: 100 * _correlation(name, guesses.reshape(-1).double(), truth.double()) for name in task.metrics}


def _tensor(values: Any) -> Tensor:
    """Values on the CPU; numbers of Python as float64, which torch would round to float32."""
    return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _classes(task: Task, values: Tensor, name: str = "predictions") -> Tensor:
    if values.dim() == 2 and name == "predictions" and values.shape[1] == task.num_labels:
        values = values.argmax(1)
    if values.dim() != 1:
        raise ValueError(
            f"{name}: expected indices (N,) or, of predictions, logits (N, {task.num_labels}), got shape "
            f"{tuple(values.shape)}"
        )
    if values.is_floating_point() or not 0 <= int(values.min()) <= int(values.max()) < task.num_labels:
        raise ValueError(
            f"{name}: expected indices of 0 to {task.num_labels - 1}, got {values.dtype} of {values.min()} to "
            f"{values.max()}"
        )
    return values.long()


def _classification(task: Task, metric: str, predictions: Tensor, references: Tensor) -> float:
    """In percent, from the counts of predictions by class: torchmetrics' own scores are rounded to float32."""
    classes = task.num_labels
    counts = multiclass_confusion_matrix(predictions, references, classes).tolist()  # [reference][prediction]
    correct, total = sum(counts[index][index] for index in range(classes)), len(references)
    if metric == "accuracy":
        return 100 * correct / total
    if metric == "f1" and classes != 2:
        raise ValueError(f"f1: expected a task of two classes, got {classes}")
    if len(present := references.unique()) < 2:
        raise ValueError(
            f"{metric}: expected references of at least two classes, got {task.labels[int(present)]!r} alone"
        )
    if metric == "f1":
        return 100 * 2 * counts[1][1] / (2 * counts[1][1] + counts[0][1] + counts[1][0])
    # The correlation of the indicators of the classes, times the square of the number of examples (Gorodkin, 2004).
    there, predicted = [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]
    covariance = correct * total - sum(map(int.__mul__, there, predicted))
    variances = [total**2 - sum(count**2 for count in each) for each in (there, predicted)]
    return 100 * covariance / math.sqrt(variances[0] * variances[1]) if variances[1] else 0.0


def _correlation(metric: str, predictions: Tensor, references: Tensor) -> float:
    if len(references.unique()) < 2:
        raise ValueError(f"{metric}: expected references of at least two values, got {references[0].item()} alone")
    if len(predictions.unique()) < 2:
        return 0.0
    if metric == "spearman":
        predictions, references = _ranks(predictions), _ranks(references)
    return float(pearson_corrcoef(predictions, references))


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,) from 1 in float64; equal values share the mean of theirs."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1).double() / 2)[where]
