"""The scores of a task's predictions, in percent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .squad import squad_scores
from .tasks import Task, get_task


def compute_metrics(task: str | Task, predictions: Any, references: Any) -> dict[str, float]:
    """Compute the task's metrics in percent and float64: 100 is a perfect score, and also a correlation of 1.

    Accuracy; F1 of the class of index 1; Matthews' correlation; Pearson's and Spearman's correlation (ties get their
    mean rank); exact match and F1 of texts for question answering (:func:`~.squad.squad_scores`). Predictions that are
    all equal correlate with nothing: their correlation is 0, not NaN.

    Args:
        task: a task or its name.
        predictions: for a classification indices of classes (N,) or logits (N, classes); for a regression (N,) or
            (N, 1); tensors, arrays or lists. For question answering texts by id.
        references: indices (N,), scores (N,), or rows with ``id`` and ``answers``.

    Raises:
        ValueError: lengths that differ, none at all, values that are not finite, and metrics that references of one
            class or one value leave undefined (all but accuracy).
    """
    task = get_task(task)
    if task.kind == "qa":
        scores = squad_scores(cast("Mapping[str, str]", predictions), cast("Iterable[Mapping[str, Any]]", references))
        return {name: scores[name] for name in task.metrics}
    guesses, truth = (torch.as_tensor(values, dtype=torch.float64) for values in (predictions, references))
    if len(guesses) != len(truth) or not len(truth):
        raise ValueError(
            f"predictions: expected as many as references, and at least one, got {len(guesses)} for {len(truth)}"
        )
    for name, values in (("predictions", guesses), ("references", truth)):
        if bad := int((~torch.isfinite(values)).sum()):
            raise ValueError(f"{name}: expected finite numbers, got {bad} of {values.numel()} that are not")
    if guesses.dim() == 2:
        guesses = guesses.argmax(1).double() if task.kind == "classification" else guesses.squeeze(1)
    if guesses.shape != truth.shape:
        raise ValueError(f"predictions: expected shape {tuple(truth.shape)}, got {tuple(guesses.shape)}")
    if set(task.metrics) != {"accuracy"} and task.main != "accuracy" and len(truth.unique()) < 2:
        raise ValueError(f"{task.main}: expected references of at least two values, got {float(truth[0]):g} alone")
    return {name: 100 * _METRICS[name](guesses, truth) for name in task.metrics}


def _accuracy(guesses: Tensor, truth: Tensor) -> float:
    return int((guesses == truth).sum()) / len(truth)


def _f1(guesses: Tensor, truth: Tensor) -> float:
    found, wanted = guesses == 1, truth == 1
    return 2 * int((found & wanted).sum()) / max(1, int(found.sum()) + int(wanted.sum()))


def _matthews(guesses: Tensor, truth: Tensor) -> float:
    """Pearson's correlation of the indicators of the classes, summed over classes (Gorodkin, 2004)."""
    classes = torch.cat([guesses, truth]).unique()
    return _correlation(*((values[:, None] == classes).double() for values in (guesses, truth)))


def _pearson(guesses: Tensor, truth: Tensor) -> float:
    return _correlation(guesses[:, None], truth[:, None])


def _spearman(guesses: Tensor, truth: Tensor) -> float:
    return _correlation(_ranks(guesses)[:, None], _ranks(truth)[:, None])


def _correlation(x: Tensor, y: Tensor) -> float:
    """The correlation of the columns of (N, k) with those of another (N, k), their covariances and variances summed."""
    x, y = x - x.mean(0), y - y.mean(0)
    spread = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / spread if spread else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,) from 1; equal values share the mean of theirs."""
    _, where, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1).double() / 2)[where]


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
