"""Batches with padding: computed on their real tokens alone, with the same values there; and batches that are wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from kron_kernels.convert.kronify import kronify_
from kron_kernels.models import blocks, fuse_
from kron_kernels.testing.accuracy import assert_accurate
from tests.models.bert_cases import SIZES, make, run, unfused

LENGTHS = torch.tensor([7, 2, 12, 1, 7, 3])
MASK = (torch.arange(12) < LENGTHS[:, None]).long()
TOKENS = 32


def batch(mask: torch.Tensor = MASK) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": (ids > 25).long()}


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each feed-forward block worked on."""
    counts = []
    block = blocks.kron_ffn

    def counting(x, *args, **kwargs):
        counts.append(x[..., 0].numel())
        return block(x, *args, **kwargs)

    monkeypatch.setattr(blocks, "kron_ffn", counting)
    return counts


def padding_free() -> nn.Module:
    return make("K21", padding_free=True)


HOLES = torch.ones(4, 12, dtype=torch.long)
HOLES[0, 3:9] = HOLES[1, :5] = HOLES[2, 2::2] = 0


@pytest.mark.parametrize(
    ("mask", "attention"),
    [(MASK.bool(), "sdpa"), (MASK.flip(1), "eager"), (HOLES, "sdpa")],
    ids=["right", "left", "holes"],
)
def test_real_tokens_come_out_the_same_and_padding_zero(mask, attention, tokens):
    model = padding_free()
    model.pooler = None  # with padding on the left it would read a padding token
    model.set_attn_implementation(attention)
    plain, inputs = unfused(model), batch(mask.long())
    inputs["attention_mask"] = mask
    (actual,), (same,) = run(model, inputs), run(plain, inputs)
    (oracle,) = run(plain.double(), inputs)
    assert tokens == [int(mask.sum())] * 2
    real = mask.bool()
    assert_accurate(actual[real], same[real], oracle[real])
    assert not actual[~real].any()


def test_gradients_flow_through_the_packing_of_embeddings_and_positions(tokens):
    model, inputs = padding_free(), batch()
    inputs["position_ids"] = torch.arange(12).flip(0)[None]
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    grads = []
    for each in (model, unfused(model)):
        result = each(**inputs).last_hidden_state * MASK.unsqueeze(-1)
        grads.append([result, *torch.autograd.grad(result.square().sum(), [*each.encoder.parameters()])])
    assert tokens == [TOKENS] * 2
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_models_converted_in_place_and_dense_ones(tokens):
    model = BertModel(BertConfig(**SIZES)).eval()
    expected, got = run(model, batch())[0], run(fuse_(copy.deepcopy(model)), batch())[0]
    torch.testing.assert_close(got, expected * MASK.unsqueeze(-1), rtol=1e-4, atol=1e-4)
    kronify_(model, "K8", fit=False)
    run(fuse_(model), batch())
    little = (torch.arange(12) < torch.tensor([[8], [12], [12], [12]])).long()  # two lengths, four tokens saved
    run(model, batch(little))
    assert tokens == [TOKENS] * 2 + [48] * 2


@pytest.mark.parametrize("case", ["off", "training", "output_hidden_states", "output_attentions", "pooled-padding"])
def test_when_the_whole_batch_is_computed(case, tokens):
    model = make("K21", padding_free=case != "off").train(case == "training")
    inputs = batch(MASK.flip(1) if case == "pooled-padding" else MASK)
    run(model, inputs, **({case: True} if case.startswith("output") else {}))
    assert tokens == [72] * 2


IDS = torch.ones(3, 6, dtype=torch.long)
INDEX = r"expected indices in \[0, {}\), got {}$"
LONG = r"expected sequences of at most 20 tokens \(max_position_embeddings\), got 21"
EMPTY = r"with at least one sequence of at least one token, got \("


# With gradients the modules compute one by one; the errors are the same.
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_ids": IDS * 50}, IndexError, "input_ids: " + INDEX.format(50, 50)),
        ({"input_ids": IDS - 2}, IndexError, "input_ids: " + INDEX.format(50, -1)),
        ({"input_ids": IDS, "token_type_ids": IDS * 2}, IndexError, "token_type_ids: " + INDEX.format(2, 2)),
        ({"input_ids": IDS, "position_ids": -IDS}, IndexError, "position_ids: " + INDEX.format(20, -1)),
        ({"input_ids": IDS[:2, :1].expand(2, 21)}, ValueError, f"input_ids: {LONG}"),
        ({"inputs_embeds": torch.ones(2, 21, 48)}, ValueError, f"inputs_embeds: {LONG}"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids: expected shape \(batch, length\) " + EMPTY),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids: expected shape \(batch, length\) " + EMPTY),
        ({"inputs_embeds": torch.ones(0, 5, 48)}, ValueError, r"inputs_embeds: .* with at least one"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, ValueError, r"attention_mask: expected shape \(3, 6\), got \("),
    ],
)
def test_wrong_inputs(inputs, error, message, gradients):
    with pytest.raises(error, match=message):
        padding_free().requires_grad_(gradients)(**inputs)
