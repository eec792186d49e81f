"""The captured forward, with a graph that is made up: running the model again into the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kron_kernels.models import CapturedModel, KronBertForSequenceClassification, KronBertModel, capture
from tests.models.bert_cases import IDS, INPUTS, MASK, make


def _record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    with torch.no_grad():
        output = run()

    def replay() -> None:
        with torch.no_grad():
            for name, value in run().items():
                output[name].copy_(value)

    return replay, output


@pytest.mark.parametrize("kind", [KronBertModel, KronBertForSequenceClassification])
@torch.no_grad()
def test_replays_compute_what_the_model_does(kind: Any) -> None:
    model = make("K8", kind)
    captured = CapturedModel(model, 3, 6, True, _record)
    real = MASK.bool() if kind is KronBertModel else slice(None)
    for inputs, kept in (({"input_ids": IDS}, slice(None)), (INPUTS, real)):
        actual, expected = captured(**inputs), model(**inputs)
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual[0][kept], expected[0][kept])
    before = actual[0].clone()
    captured(IDS.flip(1))
    torch.testing.assert_close(actual[0], before, rtol=0, atol=0)
    assert captured(IDS, copy=False)[0] is captured(IDS.flip(1), copy=False)[0]


def test_bad_input() -> None:
    model = make()
    captured = CapturedModel(model, 3, 6, False, _record)
    with pytest.raises(ValueError, match="attention_mask: expected None, for the model was captured without padding"):
        captured(IDS, MASK)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(3, 6\), got \(3, 5\)"):
        captured(IDS[:, :5])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        model.capture(0, 7)
    with pytest.raises(ValueError, match=r"length: expected at most 20 \(max_position_embeddings\), got 21"):
        model.capture(1, 21)
    with pytest.raises(RuntimeError, match="model: expected a model on a CUDA device to capture, got one on cpu"):
        capture(model, 1, 7)
    with pytest.raises(ValueError, match="model: expected a model in evaluation mode"):
        model.train().capture(1, 7)
