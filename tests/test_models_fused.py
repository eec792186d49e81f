"""BERT through the fused ops: the same values, gradients, files and recorded outputs as through the modules."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from cases import assert_accurate
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.activations import ACT2FN

from kron_kernels import reference
from kron_kernels.convert import kronify_
from kron_kernels.models import (
    KronBertConfig,
    KronBertForMaskedLM,
    KronBertForPreTraining,
    KronBertForQuestionAnswering,
    KronBertForSequenceClassification,
    KronBertModel,
    bert_layers,
    fuse_,
)
from kron_kernels.nn import KronLinear
from kron_kernels.presets import KronConfig, ShapeRule

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}
TERMS = KronConfig(
    {
        "attention": ShapeRule(b=(2, 2), terms=3),
        "ffn_in": ShapeRule(a=(4, 2), terms=2),
        "ffn_out": ShapeRule(a=(2, 8), terms=2),  # does not chain with the first half: 4x48 grids against 8x24
        "embedding": ShapeRule(b=(1, 4), terms=2),
    }
)
KRON = {"K8": "K8", "K21": "K21", "terms": TERMS}
HEADS = (
    KronBertModel,
    KronBertForMaskedLM,
    KronBertForPreTraining,
    KronBertForSequenceClassification,
    KronBertForQuestionAnswering,
)
IDS = torch.tensor([[5, 9, 2, 30, 7, 11], [8, 3, 40, 1, 0, 0], [4, 0, 0, 0, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "token_type_ids": (IDS > 8).long()}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FUSED_OPS = ("kron_embedding", "kron_qkv", "kron_matmul_norm", "kron_ffn")


def make(kron="K8", cls: type = KronBertModel, **options) -> nn.Module:
    """A model whose biases and norms say something too, computed on the whole batch, padding included."""
    model = cls(KronBertConfig(kron=KRON.get(kron, kron), **{**SIZES, "padding_free": False, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif name.endswith("LayerNorm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def unfused(model: nn.Module) -> nn.Module:
    """A copy that computes by transformers' own code on the Kronecker modules."""
    plain = {fused: theirs for theirs, fused in bert_layers._FUSED.items()}
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
        module._forward_pre_hooks.clear()
    return model


def run(model: nn.Module, inputs=INPUTS, **options) -> list[torch.Tensor]:
    """Every tensor of the outputs."""
    with torch.no_grad():
        result = model(**inputs, **options)
    values = (value if isinstance(value, tuple) else (value,) for value in result.values())
    return [tensor for value in values for tensor in value if isinstance(tensor, torch.Tensor)]


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

        def counting(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in FUSED_OPS:
        count(bert_layers, name)
    count(KronLinear, "forward")
    return counts


ALL_FUSED = {"kron_embedding": 1, "kron_qkv": 2, "kron_matmul_norm": 2, "kron_ffn": 2}


@pytest.mark.parametrize("kron", KRON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fused_computes_what_the_modules_do(kron, dtype, calls):
    model = make(kron).to(dtype)
    run(model)
    assert calls == ALL_FUSED
    assert_same(model)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("kron", ["K8", "K21"])
def test_every_head_is_fused(cls, kron, calls):
    model = make(kron, cls)
    run(model)
    assert calls == ALL_FUSED
    assert_same(model)
