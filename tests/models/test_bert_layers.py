"""BERT through the fused ops: the same values, gradients and outputs as through the modules."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig
from kron_kernels.models import bert_layers, blocks, fuse_
from kron_kernels.nn import KronLinear
from kron_kernels.schemas.registry import HUGGING_FACE_ACTIVATIONS
from kron_kernels.testing.accuracy import assert_accurate
from tests.models.bert_cases import IDS, INPUTS, KRON, NO_DROPOUT, SIZES, TERMS, make, run, unfused


def assert_same(model: nn.Module, inputs=INPUTS, **options) -> None:
    """The error rule for every output, over transformers' own path in float64."""
    plain = unfused(model)
    actual, same = run(model, inputs, **options), run(plain, inputs, **options)
    oracle = run(plain.double(), inputs, **options)
    assert len(actual) == len(oracle) > 0
    for values in zip(actual, same, oracle, strict=True):
        assert_accurate(*values)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused function was called, and a Kronecker layer by itself."""
    counts: Counter[str] = Counter()

    def count(owner, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **rest: counts.update([name]) or function(*args, **rest))

    for name in ("kron_qkv", "kron_matmul_norm", "kron_ffn"):
        count(blocks, name)
    count(bert_layers, "kron_embedding")
    count(KronLinear, "forward")
    return counts


ALL_FUSED = {"kron_embedding": 1, "kron_qkv": 2, "kron_matmul_norm": 2, "kron_ffn": 2}


@pytest.mark.parametrize(
    ("kron", "dtype"), [("K8", torch.float32), ("K21", torch.bfloat16), ("terms", torch.float64)], ids=str
)
def test_fused_computes_what_the_modules_do(kron, dtype, calls):
    model = make(kron).to(dtype)
    run(model)
    assert calls == ALL_FUSED
    assert_same(model)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": IDS, "position_ids": torch.arange(6).flip(0)[None]},
        {"input_ids": IDS, "attention_mask": torch.ones(3, 1, 6, 6).tril().bool()},
        {"inputs_embeds": torch.linspace(-1, 1, 3 * 6 * 48).view(3, 6, 48)},
    ],
    ids=["positions", "square-mask", "embeddings"],
)
def test_inputs_of_every_kind(inputs):
    assert_same(make(), inputs)
    if "position_ids" in inputs:
        model = make()
        model.set_attn_implementation("eager")
        assert_same(model, inputs, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("name", HUGGING_FACE_ACTIVATIONS)
def test_activations_and_chunks_stay_fused(name, calls):
    model = make(hidden_act=name, chunk_size_feed_forward=2)
    run(model)
    assert calls["kron_ffn"] == 2 * 3
    assert_same(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    result = model(**INPUTS).last_hidden_state * INPUTS["attention_mask"].unsqueeze(-1)
    parameters = {name: value for name, value in model.named_parameters() if "pooler" not in name}
    return dict(zip(parameters, torch.autograd.grad(result.square().mean(), parameters.values()), strict=True))


@pytest.mark.parametrize("kron", KRON)
def test_gradients_are_equal(kron, calls):
    model = make(kron, **NO_DROPOUT).train()
    plain = unfused(model)
    actual = gradients(model)
    fused = 0 if kron == "low-rank" else 2  # of two layers
    assert calls["kron_ffn"] == calls["kron_qkv"] == calls["kron_matmul_norm"] == fused
    same, oracle = gradients(plain), gradients(plain.double())
    for name, gradient in actual.items():
        error, theirs = ((each.double() - oracle[name]).norm() for each in (gradient, same[name]))
        assert error <= 4 * theirs + 1e-6 * oracle[name].norm(), name


@pytest.mark.parametrize(
    ("roles", "skip", "expected"),
    [
        (("attention", "embedding"), "", {"kron_embedding": 1, "kron_qkv": 2, "kron_matmul_norm": 2}),
        (("ffn_in",), "", {"forward": 2}),
        (("attention",), "encoder.layer.0.attention.self.key", {"kron_qkv": 1, "kron_matmul_norm": 2, "forward": 2}),
    ],
)
def test_dense_layers_fall_back_by_themselves(roles, skip, expected, calls):
    model = make(KronConfig({role: TERMS.rules[role] for role in roles}, skip=(skip,) if skip else ()))
    run(model)
    assert calls == expected
    assert_same(model)


def test_hooks_are_called():
    model = make()
    layer, expected = model.encoder.layer[0], run(model)
    hooked = [model.embeddings.word_embeddings, model.embeddings.LayerNorm, layer.attention, layer.attention.self.key]
    for module in (*hooked, layer.attention.output.dropout, layer.intermediate.intermediate_act_fn, layer.output.dense):
        seen = []
        with module.register_forward_hook(lambda module, *_, seen=seen: seen.append(module)):
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        assert seen == [module]


def test_a_decoder_with_a_cache_is_transformers_own_under_autocast_too(calls):
    model = make(is_decoder=True, use_cache=True)
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first = model(IDS[:, :4])
            step = model(IDS[:, 4:], past_key_values=first.past_key_values).last_hidden_state
            whole = unfused(model)(IDS, use_cache=False).last_hidden_state
        tolerance = 0.1 if enabled else 1e-4
        torch.testing.assert_close(step, whole[:, 4:], rtol=tolerance, atol=tolerance)
    assert calls["kron_qkv"] == 0


def test_fuse_serves_what_kronify_converted(calls):
    model = BertForMaskedLM(BertConfig(**SIZES, hidden_act="quick_gelu")).eval()
    kronify_(model, "K8", fit=False)
    names, expected = list(model.state_dict()), run(model)
    calls.clear()
    assert fuse_(fuse_(model)) is model
    assert type(model) is BertForMaskedLM
    assert list(model.state_dict()) == names
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    # an activation that no kernel has is the modules' own
    assert calls == {"kron_embedding": 1, "kron_qkv": 2, "kron_matmul_norm": 4, "forward": 2}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compile_whole_and_once_for_all_batches(training):
    torch._dynamo.reset()
    model = make("K21", padding_free=True, **NO_DROPOUT).train(training)
    backend = "eager" if training else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    parameters = [model.embeddings.word_embeddings.a, *model.encoder.parameters()]
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((2, 5), (3, 6), (5, 9)):
            ids = torch.randint(1, 50, (batch, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(length - 2)}
            real = inputs["attention_mask"].bool()
            results = [each(**inputs).last_hidden_state[real] for each in (compiled, model)]
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
            if training:
                grads = [torch.autograd.grad(result.square().mean(), parameters) for result in results]
                torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
