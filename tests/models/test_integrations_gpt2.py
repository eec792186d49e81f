"""GPT-2: Conv1D layers converted, presets, generation, saving and loading, and orders of channels folded away."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from kron_kernels.convert.calibrate import calibrate
from kron_kernels.convert.counting import count_parameters
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig, ShapeRule, preset
from kron_kernels.models.gpt2 import KronGPT2Config, KronGPT2LMHeadModel, KronGPT2Model, reconstruct_dense
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


def perplexity(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(IDS, labels=IDS).loss.exp())


def conv1d(inputs: int, outputs: int) -> Conv1D:
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def transposed(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "data-aware"])
def test_conv1d_is_converted_as_the_linear_layer_of_its_transpose(calibrated):
    layers = nn.Sequential(conv1d(24, 36), nn.Tanh(), conv1d(36, 12))
    twins = nn.Sequential(transposed(layers[0]), nn.Tanh(), transposed(layers[2]))
    config = KronConfig({"all": ShapeRule(b=(2, 3), terms=2)}, patterns={"all": (r"^\d$",)}, skip=(r"^1$",))
    batches = [torch.randn(50, 24) + 1]
    moments = calibrate(layers, batches) if calibrated else None
    if moments is not None:
        for name, moment in calibrate(twins, batches).items():
            torch.testing.assert_close(moments[name], moment)
    reports = [kronify_(model, config, calibration=moments) for model in (layers, twins)]
    assert [layer.a for layer in reports[0].layers] == [(18, 8), (6, 12)]
    for mine, theirs in zip(*(report.layers for report in reports), strict=True):
        assert mine == theirs
    for mine, theirs in zip(layers.parameters(), twins.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    x = torch.randn(5, 24)
    assert torch.equal(layers(x), twins(x))


def test_odd_class_called_conv1d_is_refused():
    class Conv1D(nn.Module):  # not transformers'
        weight = nn.Parameter(torch.zeros(4, 4))

    config = KronConfig({"all": ShapeRule(b=(2, 2))}, patterns={"all": (r"^0$",)})
    with pytest.raises(ValueError, match=r"expected 0 \(all\) to be nn.Linear, Conv1D or nn.Embedding, got Conv1D"):
        kronify_(nn.Sequential(Conv1D()), config)


@pytest.mark.parametrize(
    ("name", "count"), [("KnGPT2", 83_907_506), ("TQCompressor", 81_336_388), ("TQCompressor-QKV", 76_027_984)]
)
def test_presets_have_the_papers_sizes_on_gpt2_small(name, count):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
        model.tie_weights()
    report = kronify_(model, name, fit=False)
    assert (report.params_before, report.params_after) == (124_439_808, count)
    shapes = {layer.name.removeprefix("transformer."): (layer.a, layer.b, layer.terms) for layer in report.layers}
    blocks = {int(layer.split(".")[1]) for layer in shapes if layer != "wte"}
    assert blocks == {1, 3, 5, 7, 9, 11}
    if name == "KnGPT2":
        assert shapes["h.1.attn.c_attn"] == ((2304, 384), (1, 2), 1)
        assert shapes["h.11.attn.c_proj"] == ((768, 384), (1, 2), 1)
        assert shapes["wte"] == ((50257, 384), (1, 2), 1)
    else:
        assert shapes["h.1.mlp.c_fc"] == ((768, 384), (4, 2), 4)
        assert shapes["h.11.mlp.c_proj"] == ((384, 768), (2, 4), 4)
        assert ("h.1.attn.c_attn" in shapes) == (name == "TQCompressor-QKV")
        assert "h.1.attn.c_proj" not in shapes


@pytest.mark.parametrize("name", PRESETS)
def test_converted_model_is_its_dense_reconstruction(name):
    dense = make_gpt2()
    converted = copy.deepcopy(dense)
    kronify_(converted, name)
    rebuilt = reconstruct_dense(converted)
    assert type(rebuilt) is GPT2LMHeadModel
    assert not any(isinstance(module, (KronLinear, KronEmbedding, KronDecoder)) for module in rebuilt.modules())
    exact = logits(copy.deepcopy(rebuilt).double())
    error, theirs = ((logits(model).double() - exact).norm() for model in (converted, rebuilt))
    assert error <= 2 * theirs
    assert perplexity(converted) == pytest.approx(perplexity(rebuilt), rel=1e-5)
    assert not torch.allclose(logits(converted), logits(dense), atol=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_are_those_of_the_reconstruction(name):
    model = make_gpt2().double()
    kronify_(model, name)
    rebuilt = reconstruct_dense(model)
    for each in (model, rebuilt):
        each(IDS, labels=IDS).loss.backward()
    block, theirs = model.transformer.h[1].mlp.c_fc, rebuilt.transformer.h[1].mlp.c_fc
    weight = block.dense_weight()
    want = torch.autograd.grad(weight, [block.a, block.b], theirs.weight.grad.T)
    for got, wanted in zip((block.a.grad, block.b.grad), want, strict=True):
        torch.testing.assert_close(got, wanted)
    # The head's gradient and the embedding's meet in the factors they share.
    table = model.transformer.wte
    want = torch.autograd.grad(table.dense_weight(), [table.a, table.b], rebuilt.transformer.wte.weight.grad)
    for got, wanted in zip((table.a.grad, table.b.grad), want, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", PRESETS)
def test_generation_with_the_cache_is_that_without_and_of_the_reconstruction(name):
    model = make_gpt2()
    kronify_(model, name)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    cached, plain = (model.generate(IDS[:1], use_cache=cache, **options) for cache in (True, False))
    assert cached.shape[1] > IDS.shape[1]
    assert torch.equal(cached, plain)
    assert torch.equal(cached, reconstruct_dense(model).generate(IDS[:1], **options))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_models_load_through_the_auto_class(tmp_path, tied):
    dense = make_gpt2(tie_word_embeddings=tied)
    before = copy.deepcopy(dense.state_dict())
    model = KronGPT2LMHeadModel.from_dense(dense, "TQCompressor-QKV")
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert model.conversion_report.params_before > model.conversion_report.params_after
    assert isinstance(model.lm_head, KronDecoder) == tied
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is KronGPT2LMHeadModel
    assert count_parameters(loaded) == count_parameters(model)
    assert not tied or loaded.lm_head.a is loaded.transformer.wte.a
    assert torch.equal(logits(loaded.eval()), logits(model))
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert type(body) is KronGPT2Model
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, model.transformer(IDS).last_hidden_state)


def test_head_keeps_several_terms_of_the_embedding():
    model = make_gpt2()
    kronify_(model, KronConfig({"embedding": ShapeRule(b=(1, 4), terms=4)}))
    assert isinstance(model.lm_head, KronDecoder)
    dense = reconstruct_dense(model)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


def test_fresh_models_are_drawn_as_gpt2_is():
    config = KronGPT2Config(vocab_size=400, n_embd=96, n_layer=8, n_head=4, kron="TQCompressor", bos_token_id=1)
    model = KronGPT2LMHeadModel(config)
    assert model.lm_head.a is model.transformer.wte.a
    wide, narrow = 0.02, 0.02 / 4
    for index, block in enumerate(model.transformer.h):
        for layer, std in ((block.mlp.c_fc, wide), (block.mlp.c_proj, narrow), (block.attn.c_proj, narrow)):
            assert not layer.bias.any()
            if isinstance(layer, KronLinear):  # an entry of the weight sums 4 products of two entries
                std = (std / 2) ** 0.5
            weight = layer.a if isinstance(layer, KronLinear) else layer.weight
            assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)
        assert isinstance(block.mlp.c_fc, KronLinear) == (index % 2 == 1)
    assert float(model.transformer.wte.a.detach().std()) == pytest.approx(wide**0.5, rel=0.1)


def random_order(size: int, block: int) -> torch.Tensor:
    return torch.cat([start + torch.randperm(block) for start in range(0, size, block)])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["residual", "h.2.hidden", "h.1.value", "h.3.query"])
def test_a_permuted_model_computes_the_same(name, tied):
    model = make_gpt2(tie_word_embeddings=tied).double()
    wanted, weights = logits(model), copy.deepcopy(model.state_dict())
    size, block = {"residual": (48, 48), "hidden": (192, 192), "value": (48, 12), "query": (48, 12)}[
        name.split(".")[-1]
    ]
    permute_gpt2_(model, {name: random_order(size, block)})
    assert sum(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()) >= 2
    torch.testing.assert_close(logits(model), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_searched_orders_fit_better_and_change_nothing_else(name):
    model = make_gpt2()
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
    ("permutations", "match"),
    [
        ({"h.9.hidden": torch.arange(192)}, "permutations: expected names among residual, .*, got 'h.9.hidden'"),
        ({"residual": torch.arange(47)}, r"permutations: expected residual to permute 48 channels, got shape \(47,\)"),
        ({"residual": torch.zeros(48)}, "permutations: expected residual to permute 48 channels"),
        (
            {"h.1.value": torch.arange(48).flip(0)},
            "expected h.1.value to keep channels in their heads of 12, got others",
        ),
    ],
)
def test_orders_that_do_not_fit_are_refused_and_change_nothing(permutations, match):
    model = make_gpt2()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        permute_gpt2_(model, {"h.0.hidden": torch.arange(192).flip(0), **permutations})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_that_cannot_be_permuted_are_refused():
    with pytest.raises(TypeError, match="model: expected GPT2LMHeadModel or GPT2Model, got Linear"):
        permute_gpt2_(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="model: expected a GPT-2 without cross-attention, got one with it"):
        permute_gpt2_(make_gpt2(add_cross_attention=True), {})
    converted = make_gpt2()
    kronify_(converted, "KnGPT2")
    with pytest.raises(ValueError, match="model: expected a dense GPT-2, got one with converted layers"):
        permute_gpt2_(converted, {})


def test_other_models_are_refused_by_name():
    bert = BertModel(BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(TypeError, match="dense: expected GPT2LMHeadModel, got BertModel"):
        KronGPT2LMHeadModel.from_dense(bert)
    with pytest.raises(TypeError, match="model: expected GPT2LMHeadModel, got BertModel"):
        reconstruct_dense(bert)
    with pytest.raises(ValueError, match="preset KnGPT2 does not fit hidden_size=15"):
        KronGPT2Config(n_embd=15, n_head=3)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_permute", "vit"])
def test_versions_out_of_range_are_named(name, monkeypatch):
    spec = importlib.util.find_spec(f"kron_kernels.integrations.{name}")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "4.50.0")
    with pytest.raises(ImportError, match=r"transformers: expected version >=5\.24,<6, got 4\.50\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_preset_configurations_survive_json():
    for name in PRESETS:
        config = preset(name)
        assert KronConfig.from_json(config.to_json()) == config
        assert config.skips("transformer.h.10.mlp.c_fc")
        assert not config.skips("transformer.h.11.mlp.c_fc")


def test_example_runs_on_a_tiny_random_model(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import gpt2

    gpt2.main([])
    said = capsys.readouterr().out
    assert "same text with and without the cache: True" in said
    assert "loaded model computes the same: True" in said
