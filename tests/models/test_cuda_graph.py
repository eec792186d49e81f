"""The captured forward, with a graph that is made up: running the model again into the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kron_kernels.models import (
    CapturedModel,
    KronBertConfig,
    KronBertForSequenceClassification,
    KronBertModel,
    capture,
)
from tests.models.bert_cases import SIZES


def _record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    with torch.no_grad():
        output = run()

    def replay() -> None:
        with torch.no_grad():
            for name, value in run().items():
                output[name].copy_(value)

    return replay, output


@pytest.fixture(params=[KronBertModel, KronBertForSequenceClassification], ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param(KronBertConfig(kron="K8", padding_free=False, **SIZES)).eval()


def _inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, shape, generator=generator)
    lengths = torch.randint(2, shape[1] + 1, (shape[0], 1), generator=generator)
    return ids, (torch.arange(shape[1]) < lengths).long(), torch.randint(0, 2, shape, generator=generator)


@torch.no_grad()
def test_replays_compute_what_the_model_does(model: Any) -> None:
    captured = CapturedModel(model, 3, 7, False, _record)
    ids, _, types = _inputs(3, 7)
    for given in ((ids, types), (ids.flip(0), types), (ids, None)):
        expected = model(given[0], token_type_ids=given[1])
        actual = captured(given[0], token_type_ids=given[1])
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual[0], expected[0])
    kept = actual[0].clone()
    captured(ids.flip(1))
    torch.testing.assert_close(actual[0], kept, rtol=0, atol=0)
    assert captured(ids, copy=False)[0] is captured(ids.flip(1), copy=False)[0]


@torch.no_grad()
def test_masks(model: Any) -> None:
    captured = CapturedModel(model, 3, 7, True, _record)
    ids, mask, _ = _inputs(3, 7)
    real = mask.bool() if isinstance(model, KronBertModel) else slice(None)
    torch.testing.assert_close(captured(ids, mask)[0][real], model(ids, attention_mask=mask)[0][real])
    torch.testing.assert_close(captured(ids)[0], model(ids)[0])
    assert not torch.allclose(captured(ids)[0][real], captured(ids, mask)[0][real], atol=1e-3)


def test_bad_input(model: Any) -> None:
    captured = CapturedModel(model, 3, 7, False, _record)
    ids, mask, types = _inputs(3, 7)
    with pytest.raises(ValueError, match="attention_mask: expected None, for the model was captured without padding"):
        captured(ids, mask)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(3, 7\), got \(3, 6\)"):
        captured(ids[:, :6])
    with pytest.raises(ValueError, match=r"token_type_ids: expected shape \(3, 7\), got \(2, 7\)"):
        captured(ids, token_type_ids=types[:2])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        model.capture(0, 7)
    with pytest.raises(ValueError, match="length: expected at least 1, got -1"):
        model.capture(1, -1)
    with pytest.raises(ValueError, match=r"length: expected at most 20 \(max_position_embeddings\), got 21"):
        model.capture(1, 21)
    with pytest.raises(RuntimeError, match="model: expected a model on a CUDA device to capture, got one on cpu"):
        capture(model, 1, 7)
    with pytest.raises(ValueError, match="model: expected a model in evaluation mode"):
        model.train().capture(1, 7)
