"""The captured forward, with a graph that is made up: running the model again into the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kron_kernels.models import CapturedModel, KronBertConfig, KronBertForSequenceClassification, KronBertModel, capture
from tests.models.bert_cases import SIZES


def _record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    with torch.no_grad():
        output = run()

    def replay() -> None:
        with torch.no_grad():
            for name, value in run().items():
                output[name].copy_(value)

    return replay, output


def _inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, shape, generator=generator)
    lengths = torch.randint(2, shape[1] + 1, (shape[0], 1), generator=generator)
    return ids, (torch.arange(shape[1]) < lengths).long(), torch.randint(0, 2, shape, generator=generator)


def _make(kind: Any = KronBertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    return kind(KronBertConfig(kron="K8", padding_free=False, **SIZES)).eval()


@pytest.mark.parametrize("kind", [KronBertModel, KronBertForSequenceClassification])
@torch.no_grad()
def test_replays_compute_what_the_model_does(kind: Any) -> None:
    model = _make(kind)
    captured = CapturedModel(model, 3, 7, True, _record)
    ids, mask, types = _inputs(3, 7)
    real = mask.bool() if kind is KronBertModel else slice(None)
    for given, kept, options in ((ids, slice(None), {"token_type_ids": types}), (ids, real, {"attention_mask": mask})):
        actual, expected = captured(given, **options), model(given, **options)
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual[0][kept], expected[0][kept])
    before = actual[0].clone()
    captured(ids.flip(1))
    torch.testing.assert_close(actual[0], before, rtol=0, atol=0)
    assert captured(ids, copy=False)[0] is captured(ids.flip(1), copy=False)[0]


def test_bad_input() -> None:
    model = _make()
    captured = CapturedModel(model, 3, 7, False, _record)
    ids, mask, _ = _inputs(3, 7)
    with pytest.raises(ValueError, match="attention_mask: expected None, for the model was captured without padding"):
        captured(ids, mask)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(3, 7\), got \(3, 6\)"):
        captured(ids[:, :6])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        model.capture(0, 7)
    with pytest.raises(ValueError, match=r"length: expected at most 20 \(max_position_embeddings\), got 21"):
        model.capture(1, 21)
    with pytest.raises(RuntimeError, match="model: expected a model on a CUDA device to capture, got one on cpu"):
        capture(model, 1, 7)
    with pytest.raises(ValueError, match="model: expected a model in evaluation mode"):
        model.train().capture(1, 7)
