"""Metrics against their definitions, written out here in plain Python."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import compute_metrics, custom_task

BINARY = dataclasses.replace(custom_task(), labels=("no", "yes"), metrics=("accuracy", "f1", "matthews"))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0.5; equal values share the mean of theirs."""
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def test_binary_metrics_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    metrics = compute_metrics(BINARY, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1] * 5 + [0] * 5)
    f1, matthews = 100 * 2 * 3 / (2 * 3 + 1 + 2), 100 * (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)
    assert metrics == pytest.approx({"accuracy": 70.0, "f1": f1, "matthews": matthews}, rel=1e-12)
    assert compute_metrics(BINARY, [0] * 5, [1, 1, 1, 0, 0])["matthews"] == 0.0
    logits = torch.tensor([[0.1, 0.9], [2.0, -1.0], [0.3, 0.2]])
    assert compute_metrics("sst2", logits, [1, 0, 1])["accuracy"] == pytest.approx(200 / 3, rel=1e-12)


def test_correlations_with_ties() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, generator=generator, dtype=torch.float64)
    y = (x**3 + torch.randn(50, generator=generator, dtype=torch.float64)).exp()
    x, y = (x * 2).round(), y.round()
    metrics = compute_metrics(custom_task(regression=True), x, y)
    expected = {"pearson": 100 * np.corrcoef(x, y)[0, 1], "spearman": 100 * np.corrcoef(ranks(x), ranks(y))[0, 1]}
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_predictions_that_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="predictions: expected as many as references, and at least one, got 2 for 1"):
        compute_metrics("sst2", [1, 0], [1])
    with pytest.raises(ValueError, match="predictions: expected finite numbers, got 1 of 3 that are not"):
        compute_metrics("stsb", [1.0, float("nan"), 2.0], [1.0, 2.0, 3.0])
