"""Block-wise training and the named starts, on tiny random BERTs whose layers do something."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from kron_kernels.compress import WARM_STARTS, start_model, warm_start
from kron_kernels.convert.presets import KronConfig
from kron_kernels.convert.rules import ShapeRule
from kron_kernels.models import KronBertModel
from tests.compress import tiny_bert

SIZES = {**tiny_bert.SIZES, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 40, "max_position_embeddings": 12}
CONFIG = KronConfig(
    {
        "attention": ShapeRule(b=(2, 2)),
        "ffn_in": ShapeRule(a=(4, 2)),
        "ffn_out": ShapeRule(a=(2, 4)),
        "embedding": ShapeRule(b=(1, 4)),
    }
)


def random_bert(**changes: Any) -> Any:
    # Larger weights than at initialisation: each layer then changes what passes through it.
    return BertModel(BertConfig(**{**SIZES, "initializer_range": 0.3, **changes})).eval()


def batches(count: int = 6, rows: int = 20, length: int = 8, seed: int = 1) -> list[dict[str, Tensor]]:
    """Skewed tokens and right padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = (40 * torch.rand(rows, length, generator=generator) ** 2).long()
        lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@torch.no_grad()
def state_errors(dense: Any, model: Any, text: list[dict[str, Tensor]]) -> list[float]:
    """Relative error of the embeddings' and each layer's output at real tokens."""
    states = []
    for encoder in (dense.base_model, model.base_model):
        rows = [
            torch.stack(encoder(**batch, output_hidden_states=True).hidden_states)[:, batch["attention_mask"].bool()]
            for batch in text
        ]
        states.append(torch.cat(rows, 1))
    wanted, got = states
    spread = (wanted - wanted.mean(1, keepdim=True)).square().sum((1, 2))
    return ((wanted - got).square().sum((1, 2)) / spread).sqrt().tolist()


@pytest.fixture(scope="module")
def dense() -> Any:
    torch.manual_seed(0)
    return random_bert()


@pytest.mark.slow
def test_lowers_every_error_on_held_out_text(dense: Any) -> None:
    held_out = batches(3, seed=2)
    errors = {}
    for method in WARM_STARTS:
        model, calibration, _ = start_model(KronBertModel, dense, CONFIG, batches(20), method=method, steps=100)
        errors[method] = state_errors(dense, model, held_out)
        assert (calibration is None) == (method == "plain")
    assert errors["data-aware"][1] < errors["plain"][1]
    for position, (before, after) in enumerate(zip(errors["data-aware"], errors["blockwise"], strict=True)):
        assert after < (1.0, 0.85, 0.85)[position] * before


def test_report_is_of_the_states_on_the_text(dense: Any) -> None:
    text = batches()
    model = KronBertModel.from_dense(dense, CONFIG)
    untrained, weights = state_errors(dense, model, text), copy.deepcopy(dense.state_dict())
    report = warm_start(dense, model, text, steps=6)
    assert report.blocks[0].error_before == pytest.approx(untrained[0], rel=1e-4)
    assert [block.error_after for block in report.blocks] == pytest.approx(state_errors(dense, model, text), rel=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())


def test_depends_on_the_seed_alone(dense: Any) -> None:
    results = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)
        model = KronBertModel.from_dense(dense, CONFIG)
        warm_start(dense, model, batches(1), steps=2, seed=seed)
        results.append(model.encoder.layer[1].output.dense.a.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_half_precision_trains_in_full(dense: Any) -> None:
    teacher = copy.deepcopy(dense).bfloat16()
    model = KronBertModel.from_dense(teacher, CONFIG)
    report = warm_start(teacher, model, batches(), steps=30)
    assert model.embeddings.word_embeddings.a.dtype is torch.bfloat16
    assert report.blocks[-1].error_after < 0.9 * report.blocks[-1].error_before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: expected an int of at least 0, got -1"),
        ({"batches": []}, "batches: expected at least one token, got none"),
        ({"dense": random_bert(num_hidden_layers=3)}, r"of dense, \(3, 16, 40\), got \(2, 16, 40\)"),
        ({"model": random_bert()}, "model: expected factored layers .* makes them.*, got none"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str, dense: Any) -> None:
    call: dict[str, Any] = {"dense": dense, "model": KronBertModel.from_dense(dense, CONFIG), "batches": batches(1)}
    with pytest.raises(ValueError, match=message):
        warm_start(**{**call, **arguments})
