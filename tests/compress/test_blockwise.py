"""Block-wise training and the named starts, on tiny random BERTs whose layers do something."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from kron_kernels.compress import WARM_STARTS, blockwise, start_model, warm_start
from kron_kernels.convert.presets import KronConfig, ShapeRule
from kron_kernels.models import KronBertForMaskedLM, KronBertModel

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 12,
}
CONFIG = KronConfig(
    {
        "attention": ShapeRule(b=(2, 2)),
        "ffn_in": ShapeRule(a=(4, 2)),
        "ffn_out": ShapeRule(a=(2, 4)),
        "embedding": ShapeRule(b=(1, 4)),
    }
)


def random_bert(kind: type[Any] = BertModel, **changes: Any) -> Any:
    # Larger weights than at initialisation: each layer then changes what passes through it.
    return kind(BertConfig(**{**SIZES, "initializer_range": 0.3, **changes})).eval()


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


def test_lowers_every_error_on_held_out_text(dense: Any) -> None:
    held_out = batches(3, seed=2)
    errors = {}
    for method in WARM_STARTS:
        model, calibration, report = start_model(KronBertModel, dense, CONFIG, batches(20), method=method, steps=100)
        errors[method] = state_errors(dense, model, held_out)
        assert (calibration is None) == (method == "plain")
        assert (report is None) == (method != "blockwise")
    assert errors["data-aware"][1] < errors["plain"][1]
    for position, (before, after) in enumerate(zip(errors["data-aware"], errors["blockwise"], strict=True)):
        assert after < (1.0, 0.85, 0.85)[position] * before


def test_report_is_of_the_states_on_the_text(dense: Any) -> None:
    text = batches()
    model = KronBertModel.from_dense(dense, CONFIG)
    untrained = state_errors(dense, model, text)
    report = warm_start(dense, model, text, steps=20)
    assert [block.name for block in report.blocks] == ["embeddings", "encoder.layer.0", "encoder.layer.1"]
    assert report.steps == 20
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in text)
    assert report.blocks[0].error_before == pytest.approx(untrained[0], rel=1e-4)
    trained = state_errors(dense, model, text)
    assert [block.error_after for block in report.blocks] == pytest.approx(trained, rel=1e-4)
    assert report.to_dict()["blocks"][1] == vars(report.blocks[1])


def test_depends_on_the_seed_alone_and_leaves_the_random_state(dense: Any) -> None:
    start = KronBertModel.from_dense(dense, CONFIG)
    results = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = copy.deepcopy(start)
        warm_start(dense, model, batches(2), steps=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(model.encoder.layer[1].output.dense.a.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_leaves_all_but_the_weights_of_the_encoder() -> None:
    dense = random_bert(BertForMaskedLM).train()
    before = copy.deepcopy(dense.state_dict())
    model = KronBertForMaskedLM.from_dense(dense, CONFIG)
    norm, head = model.bert.embeddings.LayerNorm.weight.requires_grad_(False), model.cls.predictions.transform.dense
    head.weight.grad = torch.ones(16, 16)
    weight = head.weight.clone()
    warm_start(dense, model, batches(2), steps=3)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert dense.training
    assert model.training
    assert not norm.requires_grad
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.weight.grad, torch.ones(16, 16))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not head.weight)
    assert model.cls.predictions.decoder.a is model.bert.embeddings.word_embeddings.a


def test_padding_and_the_kind_of_attention_change_nothing(dense: Any) -> None:
    models = []
    for extra, attention in ((0, "sdpa"), (3, "sdpa"), (0, "eager")):
        text = batches(2)
        for batch in text:
            padding = torch.zeros(len(batch["input_ids"]), extra, dtype=torch.long)
            # Ids under the padding that would count if anything read them.
            batch["input_ids"] = torch.cat([batch["input_ids"], padding + 39], 1)
            batch["attention_mask"] = torch.cat([batch["attention_mask"], padding], 1)
        teacher = copy.deepcopy(dense)
        teacher.set_attn_implementation(attention)
        model = KronBertModel.from_dense(teacher, CONFIG)
        warm_start(teacher, model, text, steps=3)
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    errors = [state_errors(dense, model, batches(2)) for model in models]
    assert errors[0] == pytest.approx(errors[2], rel=1e-3)


def test_half_precision_trains_in_full(dense: Any) -> None:
    teacher = copy.deepcopy(dense).bfloat16()
    model = KronBertModel.from_dense(teacher, CONFIG)
    dtypes, calls = set(), []

    def progress(*call: Any) -> None:
        dtypes.update(each.dtype for each in model.parameters())
        calls.append(call)

    report = warm_start(teacher, model, batches(), steps=30, progress=progress)
    assert dtypes == {torch.float32}
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    assert report.blocks[-1].error_after < 0.9 * report.blocks[-1].error_before
    assert calls[30] == (31, 90, "warm start: encoder.layer.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: expected an int of at least 0, got -1"),
        ({"batches": []}, "batches: expected at least one token, got none"),
        ({"batches": [torch.ones(2, 2)]}, r"batches: expected mappings that hold input_ids \(B, L\), got one without"),
        ({"dense": random_bert(num_hidden_layers=3)}, r"of dense, \(3, 16, 40\), got \(2, 16, 40\)"),
        (
            {"model": random_bert()},
            "model: expected Kronecker layers .* makes them.*, got none",
        ),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str, dense: Any) -> None:
    call: dict[str, Any] = {"dense": dense, "model": KronBertModel.from_dense(dense, CONFIG), "batches": batches(1)}
    with pytest.raises(ValueError, match=message):
        warm_start(**{**call, **arguments})


def test_training_that_diverges_is_an_error(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "LEARNING_RATE", 1e30)
    model = KronBertModel.from_dense(dense, CONFIG)
    with pytest.raises(RuntimeError, match=r"warm start: the outputs of encoder\.layer\.0 are not finite"):
        warm_start(dense, model, batches(1), steps=10)
