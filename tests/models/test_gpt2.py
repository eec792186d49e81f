"""GPT-2: Conv1D layers converted, presets, generation, saving and loading, and orders of channels folded away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig
from kron_kernels.convert.rules import BandRule, LowRankRule
from kron_kernels.models.gpt2 import KronGPT2LMHeadModel, KronGPT2Model, reconstruct_dense
from kron_kernels.models.gpt2_permute import permute_gpt2_, search_gpt2_permutations
from kron_kernels.nn import KronDecoder, KronEmbedding, KronLinear

PRESETS = ("KnGPT2", "TQCompressor", "TQCompressor-QKV")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def make_gpt2(**options) -> GPT2LMHeadModel:
    """A small GPT-2 whose norms and biases are random too, so that an order forgotten in one of them shows."""
    sizes = {"vocab_size": 60, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 4, "initializer_range": 0.2}
    config = GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **options})
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.3)
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("name", "count"), [("KnGPT2", 83_907_506), ("TQCompressor", 81_336_388), ("TQCompressor-QKV", 76_027_984)]
)
def test_presets_have_the_papers_sizes_on_gpt2_small(name, count):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
        model.tie_weights()
    report = kronify_(model, name, fit=False)
    assert (report.params_before, report.params_after) == (124_439_808, count)
    shapes = {layer.name.removeprefix("transformer."): layer.structure for layer in report.layers}
    assert {layer.split(".")[1] for layer in shapes if layer != "wte"} == {"1", "3", "5", "7", "9", "11"}
    if name == "KnGPT2":
        assert shapes["h.1.attn.c_attn"] == "2304x384 (x) 1x2"
        assert shapes["wte"] == "50257x384 (x) 1x2"
    else:
        assert shapes["h.11.mlp.c_proj"] == "4 of 384x768 (x) 2x4"
        assert ("h.1.attn.c_attn" in shapes) == (name == "TQCompressor-QKV")


@pytest.mark.parametrize("name", PRESETS)
def test_logits_gradients_and_generation_are_those_of_the_reconstruction(name):
    model = make_gpt2().double()
    kronify_(model, name)
    rebuilt = reconstruct_dense(model)
    assert type(rebuilt) is GPT2LMHeadModel
    assert not any(isinstance(module, (KronLinear, KronEmbedding, KronDecoder)) for module in rebuilt.modules())
    torch.testing.assert_close(logits(model), logits(rebuilt))
    for each in (model, rebuilt):
        each(IDS, labels=IDS).loss.backward()
    path = "wte" if name == "KnGPT2" else "h.1.mlp.c_fc"
    layer, theirs = (each.transformer.get_submodule(path) for each in (model, rebuilt))
    grad = theirs.weight.grad if name == "KnGPT2" else theirs.weight.grad.T  # the table's is the tied head's too
    want = torch.autograd.grad(layer.dense_weight(), [layer.a, layer.b], grad)
    torch.testing.assert_close((layer.a.grad, layer.b.grad), want)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    cached, plain = (model.generate(IDS[:1], use_cache=cache, **options) for cache in (True, False))
    assert cached.shape[1] > IDS.shape[1]
    assert torch.equal(cached, plain)
    assert torch.equal(cached, rebuilt.generate(IDS[:1], **options))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_models_load_through_the_auto_class(tmp_path, tied):
    dense = make_gpt2(tie_word_embeddings=tied)
    before = copy.deepcopy(dense.state_dict())
    model = KronGPT2LMHeadModel.from_dense(dense, "TQCompressor-QKV")
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert isinstance(model.lm_head, KronDecoder) == tied
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is KronGPT2LMHeadModel
    assert not tied or loaded.lm_head.a is loaded.transformer.wte.a
    assert torch.equal(logits(loaded.eval()), logits(model))
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert type(body) is KronGPT2Model
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, model.transformer(IDS).last_hidden_state)


def test_low_rank_layers_and_bands(tmp_path):
    rules = {"attention": LowRankRule(16), "ffn_in": LowRankRule(20), "embedding": BandRule(((10, 24), (None, 8)))}
    model = KronGPT2LMHeadModel.from_dense(make_gpt2(), KronConfig(rules))
    assert torch.isfinite(logits(KronGPT2LMHeadModel(model.config))).all()
    torch.testing.assert_close(logits(model), logits(reconstruct_dense(model)), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded, info = KronGPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("name", "size"), [("residual", 48), ("h.2.hidden", 192), ("h.1.value", 48), ("h.3.query", 48)]
)
def test_a_permuted_model_computes_the_same(name, size, tied):
    model = make_gpt2(tie_word_embeddings=tied).double()
    wanted, weights = logits(model), copy.deepcopy(model.state_dict())
    block = 12 if name.startswith("h.") and size == 48 else size  # channels stay in their heads
    order = torch.cat([start + torch.randperm(block) for start in range(0, size, block)])
    permute_gpt2_(model, {name: order})
    assert sum(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()) >= 2
    torch.testing.assert_close(logits(model), wanted, rtol=1e-9, atol=1e-9)


def test_searched_orders_fit_better_and_change_nothing_else():
    model, name = make_gpt2(), "KnGPT2"
    wanted = logits(model)
    plain = kronify_(copy.deepcopy(model), name)
    found = search_gpt2_permutations(model, name, rounds=4)
    assert torch.equal(logits(model), wanted)
    permute_gpt2_(model, found.permutations)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    better = kronify_(model, name)
    before, after = ([layer.relative_error for layer in report.layers] for report in (plain, better))
    assert found.errors_before == pytest.approx(before, abs=1e-4)
    assert found.errors_after == pytest.approx(after, abs=1e-4)
    assert sum(after) < 0.97 * sum(before)


@pytest.mark.parametrize(
    ("name", "order", "match"),
    [
        ("h.9.hidden", torch.arange(192), "expected names among residual, .*, got 'h.9.hidden'"),
        ("residual", torch.arange(47), r"expected residual to permute 48 channels, got shape \(47,\)"),
        ("h.1.value", torch.arange(48).flip(0), "expected h.1.value to keep channels in their heads of 12, got others"),
    ],
)
def test_orders_that_do_not_fit_are_refused_and_change_nothing(name, order, match):
    model = make_gpt2()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        permute_gpt2_(model, {"h.0.hidden": torch.arange(192).flip(0), name: order})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
