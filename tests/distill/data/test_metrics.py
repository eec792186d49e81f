"""Metrics against their definitions, written out here in plain Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import compute_metrics, custom_task

BINARY = dataclasses.replace(custom_task(), labels=("no", "yes"), metrics=("accuracy", "f1", "matthews"))
SCORES = custom_task(regression=True)
NAN = float("nan")


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def test_binary_metrics_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    metrics = compute_metrics(BINARY, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1] * 5 + [0] * 5)
    f1, matthews = 100 * 2 * 3 / (2 * 3 + 1 + 2), 100 * (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)
    assert metrics == pytest.approx({"accuracy": 70.0, "f1": f1, "matthews": matthews}, rel=1e-12)
    # Not rounded to single precision.
    assert compute_metrics("sst2", [0, 1] * 15, [0, 1] * 14 + [1, 1])["accuracy"] == 100 * 29 / 30


def test_matthews_of_several_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    references = torch.randint(3, (60,), generator=generator)
    predictions = torch.where(torch.rand(60, generator=generator) < 0.6, references, 2)
    x, y = (torch.nn.functional.one_hot(values, 3).double() for values in (predictions, references))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()
    task = dataclasses.replace(BINARY, labels=("a", "b", "c"), metrics=("matthews",))
    assert compute_metrics(task, predictions, references)["matthews"] == pytest.approx(100 * float(expected), rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations(ties: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    y = (x**3 + torch.randn(50, generator=generator, dtype=torch.float64)).exp()
    if ties:
        x, y = (x * 2).round(), y.round()
    metrics = compute_metrics(SCORES, x, y)
    assert metrics["pearson"] == pytest.approx(100 * pearson(x.tolist(), y.tolist()), rel=1e-12)
    assert metrics["spearman"] == pytest.approx(100 * pearson(ranks(x.tolist()), ranks(y.tolist())), rel=1e-12)


def test_forms_of_predictions() -> None:
    logits = torch.tensor([[0.1, 0.9], [2.0, -1.0], [0.3, 0.2]])
    assert compute_metrics("sst2", logits, [1, 0, 1])["accuracy"] == pytest.approx(200 / 3, rel=1e-12)
    column = torch.tensor([[0.1], [0.5], [0.4]])
    assert compute_metrics("stsb", column, [1.0, 3.0, 2.5])["spearman"] == pytest.approx(100, rel=1e-12)
    references = [{"id": "q", "answers": {"text": ["the red cat"], "answer_start": [0]}}]
    metrics = compute_metrics("squad", {"q": "A cat."}, references)
    assert metrics == pytest.approx({"exact_match": 0.0, "f1": 100 * 2 / 3}, abs=1e-4)


def test_constant_predictions_correlate_with_nothing() -> None:
    for constant in (0, 1):
        assert compute_metrics(BINARY, [constant] * 5, [1, 1, 1, 0, 0])["matthews"] == 0.0
    assert compute_metrics(BINARY, [0] * 5, [1, 1, 1, 0, 0])["f1"] == 0.0
    assert compute_metrics("stsb", [2.5] * 3, [0.0, 1.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("task", "predictions", "references", "message"),
    [
        ("sst2", [1, 0], [1], "predictions: expected as many as references, and at least one, got 2 for 1"),
        ("sst2", [], [], "predictions: expected as many as references, and at least one, got 0 for 0"),
        ("stsb", [1.0, NAN, NAN], [1.0, 2.0, 3.0], "predictions: expected finite numbers, got 2 of 3 that are not"),
        ("sst2", torch.full((2, 2), NAN), [0, 1], "predictions: expected finite numbers, got 4 of 4 that are not"),
        ("cola", [1, 0], [1, 1], "matthews: expected references of at least two values, got 1 alone"),
        ("stsb", [1.0, 2.0], [3.0, 3.0], "spearman: expected references of at least two values, got 3 alone"),
        ("stsb", torch.ones(2, 2), [3.0, 4.0], r"predictions: expected shape \(2,\), got \(2, 2\)"),
    ],
)
def test_errors(task: Any, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(task, predictions, references)
