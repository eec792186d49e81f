"""Batches with padding: computed on their real tokens alone, with the same values there; and batches that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from kron_kernels.convert.kronify import kronify_
from kron_kernels.models import KronBertModel, bert_layers, blocks, fuse_
from kron_kernels.models.padding import Packing
from kron_kernels.testing.accuracy import assert_accurate
from tests.models.bert_cases import IDS, SIZES, make, run, unfused

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


def padding_free(cls: type = KronBertModel, **options) -> nn.Module:
    return make("K21", cls, padding_free=True, **options)


def holes() -> torch.Tensor:
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, 3:9] = mask[1, :5] = mask[2, 2::2] = 0
    return mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.flip(1), holes()], ids=["right", "bool", "left", "holes"])
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


@pytest.mark.parametrize("given", ["positions", "row-of-positions", "embeddings", "no-types", "positional"])
def test_inputs_are_packed_as_they_are_given(given, tokens):
    model, inputs = padding_free(), batch()
    args = ()
    if given == "positions":
        inputs["position_ids"] = torch.arange(12).flip(0).expand(6, 12)
    elif given == "row-of-positions":
        inputs["position_ids"] = torch.arange(12).flip(0)[None]
    elif given == "embeddings":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    elif given == "no-types":
        del inputs["token_type_ids"]
    else:
        args = (inputs.pop("input_ids"), inputs.pop("attention_mask"), inputs.pop("token_type_ids"))
    with torch.no_grad():
        actual = model(*args, **inputs).last_hidden_state
        want = unfused(model)(*args, **inputs).last_hidden_state
    assert tokens == [TOKENS] * 2
    torch.testing.assert_close(actual[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_packing():
    model = padding_free()
    plain = unfused(model)
    for each in (model, plain):
        result = each(**batch()).last_hidden_state
        (result * MASK.unsqueeze(-1)).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "pooler" not in name)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_models_converted_in_place_and_dense_ones(tokens):
    dense = BertModel(BertConfig(**SIZES)).eval()
    expected = run(dense, batch())[0]
    got = run(fuse_(dense), batch())[0]
    torch.testing.assert_close(got[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4)
    assert not got[~MASK.bool()].any(), "packing needs no Kronecker layer"
    model = BertModel(BertConfig(**SIZES)).eval()
    kronify_(model, "K8", fit=False)
    run(fuse_(model), batch())
    model.config.padding_free = False
    run(model, batch())
    assert tokens == [TOKENS] * 2 + [72] * 2


@pytest.mark.parametrize(
    "case", ["switched-off", "training", "hidden-states", "attentions", "decoder", "plain-layer", "pooled-padding"]
)
def test_when_the_whole_batch_is_computed(case, tokens):
    options = {"switched-off": {"padding_free": False}, "decoder": {"is_decoder": True}}.get(case, {})
    model, inputs = make("K21", **{"padding_free": True, **options}), batch()
    extra = {"hidden-states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}.get(case, {})
    if case == "training":
        model.train()
    elif case == "plain-layer":
        layer = model.encoder.layer[0].attention.self
        layer.__class__ = next(cls for cls, fused in bert_layers._FUSED.items() if fused is type(layer))
    elif case == "pooled-padding":
        inputs = batch(MASK.flip(1))
    run(model, inputs, **extra)
    assert tokens == [72] * 2


def test_little_padding_is_not_worth_it(tokens):
    mask = torch.ones(4, 12, dtype=torch.long)
    assert Packing.of(mask) is None
    mask[0, -4:] = 0
    assert Packing.of(mask) is None, "two lengths, four tokens saved"
    mask[0, -9:] = 0
    packing = Packing.of(mask)
    assert packing is not None
    assert (packing.lengths, packing.sizes) == ((3, 12), (3, 36))
    assert Packing.of(mask * 0) is None


def test_a_mask_without_padding_is_dropped(monkeypatch):
    seen = []
    forward = BertModel.forward

    def recording(self, *args, **kwargs):
        seen.append(kwargs["attention_mask"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", recording)
    run(padding_free(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert seen == [None]


@pytest.mark.slow
def test_a_compiler_sees_the_whole_batch():
    torch._dynamo.reset()
    model = padding_free()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    actual, want = run(compiled, batch())[0], run(unfused(model), batch())[0]
    torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)


# With gradients the modules compute one by one; the errors are the same.
both_forms = pytest.mark.parametrize("gradients", [False, True])


@both_forms
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("index", [50, -1])
def test_ids_outside_the_vocabulary(index, masked, gradients):
    inputs = batch() if masked else {"input_ids": IDS.clone()}
    inputs["input_ids"][1, 1] = index
    with pytest.raises(IndexError, match=rf"input_ids: expected indices in \[0, 50\), got {index}$"):
        padding_free().requires_grad_(gradients)(**inputs)


@both_forms
@pytest.mark.parametrize(("name", "rows"), [("token_type_ids", 2), ("position_ids", 20)])
@pytest.mark.parametrize("below", [True, False])
def test_other_ids_outside_their_tables(name, rows, below, gradients):
    index = -1 if below else rows
    inputs = {"input_ids": IDS, name: torch.zeros_like(IDS)}
    inputs[name][2, 3] = index
    with pytest.raises(IndexError, match=rf"{name}: expected indices in \[0, {rows}\), got {index}$"):
        padding_free().requires_grad_(gradients)(**inputs)


@both_forms
def test_sequences_longer_than_the_position_table(gradients):
    model = padding_free().requires_grad_(gradients)
    for name, value in (("input_ids", torch.ones(2, 21, dtype=torch.long)), ("inputs_embeds", torch.ones(2, 21, 48))):
        text = rf"{name}: expected sequences of at most 20 tokens \(max_position_embeddings\), got 21"
        for mask in (None, torch.ones(2, 21).tril()):
            with pytest.raises(ValueError, match=text):
                model(**{name: value}, attention_mask=mask)
    model(torch.ones(2, 20, dtype=torch.long))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (4,)])
def test_batches_without_a_token(shape):
    model = padding_free()
    text = r"input_ids: expected shape \(batch, length\) with at least one sequence of at least one token, got \("
    for extra in ({}, {"attention_mask": torch.ones(shape)}):
        with pytest.raises(ValueError, match=text):
            model(torch.ones(shape, dtype=torch.long), **extra)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \(batch, length, hidden\) with at least one"):
        model(inputs_embeds=torch.ones(*shape, 48))


@pytest.mark.parametrize("shape", [(1, 12), (6, 11), (6, 13)])
def test_a_mask_of_another_shape_than_the_tokens(shape):
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(6, 12\), got \("):
        padding_free()(batch()["input_ids"], attention_mask=torch.ones(shape))
