"""Metrics against their definitions, written out here in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import compute_metrics, custom_task

BINARY = custom_task(labels=("no", "yes"), metrics=("accuracy", "f1", "matthews"))
SCORES = custom_task(kind="regression")


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def test_binary_metrics_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    references = [1] * 5 + [0] * 5
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    metrics = compute_metrics(BINARY, predictions, references)
    assert metrics == pytest.approx(
        {
            "accuracy": 70.0,
            "f1": 100 * 2 * 3 / (2 * 3 + 1 + 2),
            "matthews": 100 * (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6),
        },
        rel=1e-12,
    )
    assert list(metrics) == list(BINARY.metrics)


@pytest.mark.parametrize("correct", range(1, 30))
def test_percentages_are_not_rounded_to_single_precision(correct: int) -> None:
    references = [0, 1] * 15
    predictions = [reference if index < correct else 1 - reference for index, reference in enumerate(references)]
    assert compute_metrics(BINARY, predictions, references)["accuracy"] == 100 * correct / 30


def test_matthews_of_several_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    references = torch.randint(3, (60,), generator=generator)
    predictions = torch.where(torch.rand(60, generator=generator) < 0.6, references, 2)
    task = custom_task(labels=("a", "b", "c"), metrics=("matthews", "accuracy"))
    # Matthews' correlation is Pearson's of the class indicators, summed over classes.
    x, y = (torch.nn.functional.one_hot(values, 3).double() for values in (predictions, references))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()
    metrics = compute_metrics(task, predictions, references)
    assert metrics["matthews"] == pytest.approx(100 * float(expected), rel=1e-12)
    assert metrics["accuracy"] == 100 * int((predictions == references).sum()) / 60


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
    assert abs(metrics["pearson"] - metrics["spearman"]) > 1


def test_a_small_spread_far_from_zero_is_told_apart() -> None:
    y = [1000 + step * 1e-4 for step in range(5)]
    assert compute_metrics(SCORES, y, [1, 2, 3, 4, 5])["pearson"] == pytest.approx(100, abs=1e-3)


def test_forms_of_predictions() -> None:
    logits = torch.tensor([[0.1, 0.9], [2.0, -1.0], [0.3, 0.2]])
    assert compute_metrics("sst2", logits, [1, 0, 1])["accuracy"] == 200 / 3
    assert compute_metrics("sst2", logits.numpy(), torch.tensor([1, 0, 0])) == {"accuracy": 100.0}
    column = torch.tensor([[0.1], [0.5], [0.4]])
    assert compute_metrics("stsb", column, [1.0, 3.0, 2.5])["spearman"] == pytest.approx(100, rel=1e-12)
    assert list(compute_metrics("stsb", column, [1.0, 3.0, 2.5])) == ["pearson", "spearman"]


def test_constant_predictions_correlate_with_nothing() -> None:
    for constant in (0, 1):
        metrics = compute_metrics(BINARY, [constant] * 5, [1, 1, 1, 0, 0])
        assert metrics["matthews"] == 0.0
    assert compute_metrics(BINARY, [0] * 5, [1, 1, 1, 0, 0])["f1"] == 0.0
    assert compute_metrics("stsb", [2.5] * 3, [0.0, 1.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_perfect_and_inverse_predictions() -> None:
    assert compute_metrics(BINARY, [1, 0], [1, 0]) == {"accuracy": 100.0, "f1": 100.0, "matthews": 100.0}
    assert compute_metrics(BINARY, [0, 1], [1, 0]) == {"accuracy": 0.0, "f1": 0.0, "matthews": -100.0}
    assert compute_metrics("stsb", [3, 2, 1], [0.0, 1.0, 5.0])["spearman"] == pytest.approx(-100, rel=1e-12)


def test_question_answering_metrics() -> None:
    references = [{"id": "q", "answers": {"text": ["the red cat"], "answer_start": [0]}}]
    metrics = compute_metrics("squad", {"q": "A cat."}, references)
    assert metrics == pytest.approx({"exact_match": 0.0, "f1": 100 * 2 / 3}, abs=1e-4)


NAN = float("nan")


@pytest.mark.parametrize(
    ("task", "predictions", "references", "message"),
    [
        ("sst2", [1, 0], [1], "predictions: expected as many as references, and at least one, got 2 for 1"),
        ("sst2", [], [], "predictions: expected as many as references, and at least one, got 0 for 0"),
        ("stsb", [1.0, NAN, NAN], [1.0, 2.0, 3.0], "predictions: expected finite numbers, got 2 of 3 that are not"),
        ("stsb", [1.0, 2.0], [1.0, math.inf], "references: expected finite numbers, got 1 of 2 that are not"),
        ("sst2", torch.full((2, 2), NAN), [0, 1], "predictions: expected finite numbers, got 4 of 4 that are not"),
        ("cola", [1, 0], [1, 1], "matthews: expected references of at least two classes, got 'acceptable' alone"),
        ("stsb", [1.0, 2.0], [3.0, 3.0], "pearson: expected references of at least two values, got 3.0 alone"),
        ("stsb", torch.ones(2, 2), [3.0, 4.0], r"predictions: expected shape \(2,\), got \(2, 2\)"),
        ("sst2", [2, 0], [1, 0], r"predictions: expected indices of 0 to 1, got torch.int64 of 0 to 2"),
        ("sst2", [1, 0], [-1, 0], r"references: expected indices of 0 to 1, got torch.int64 of -1 to 0"),
        ("sst2", [0.7, 0.1], [1, 0], r"predictions: expected indices of 0 to 1, got torch.float64 of"),
        (
            "mnli",
            torch.ones(2, 2),
            [1, 0],
            r"expected indices \(N,\) or, of predictions, logits \(N, 3\), got shape \(2, 2",
        ),
        (custom_task(labels=["c", "d", "e"], metrics=["f1"]), [0, 1], [0, 1], "f1: expected a task of two"),
    ],
)
def test_errors(task: Any, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(task, predictions, references)


def test_f1_needs_both_classes_and_is_named() -> None:
    task = custom_task(labels=("no", "yes"), metrics=("f1",))
    with pytest.raises(ValueError, match="f1: expected references of at least two classes, got 'no' alone"):
        compute_metrics(task, [0, 1], [0, 0])
    assert compute_metrics("sst2", [0, 1], [0, 0]) == {"accuracy": 50.0}
