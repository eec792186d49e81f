"""Small BERT models and batches that the tests of this folder share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kron_kernels.convert.presets import KronConfig
from kron_kernels.convert.rules import BandRule, LowRankRule, ShapeRule
from kron_kernels.models import KronBertConfig, KronBertModel, bert_layers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    # Far from zero, so that a wrong layer shows in the outputs.
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
LOW_RANK = KronConfig(
    {
        "attention": LowRankRule(12),
        "ffn_in": LowRankRule(16),
        "ffn_out": LowRankRule(16),
        "embedding": BandRule(((10, 24), (20, 8), (None, 4))),
    },
    layers={"encoder.layer.1.output.dense": LowRankRule(20)},
)
KRON = {"K8": "K8", "K21": "K21", "terms": TERMS, "low-rank": LOW_RANK}
IDS = torch.tensor([[5, 9, 2, 30, 7, 11], [8, 3, 40, 1, 0, 0], [4, 0, 0, 0, 0, 0]])
MASK = (IDS != 0).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": (IDS > 8).long()}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give biases and norms values of their own, so that leaving one out shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif name.endswith("LayerNorm.weight"):
            parameter.uniform_(0.5, 1.5)
    return model


def make(kron: Any = "K8", cls: Any = KronBertModel, **options: Any) -> Any:
    """Return a KronBert in evaluation mode, which computes padding too unless ``padding_free=True``."""
    kron = KRON[kron] if isinstance(kron, str) else kron
    return randomise(cls(KronBertConfig(kron=kron, **{**SIZES, "padding_free": False, **options}))).eval()


def unfused(model: nn.Module) -> nn.Module:
    """Return a copy that computes by transformers' own code on the Kronecker modules."""
    plain = {fused: theirs for theirs, fused in bert_layers._FUSED.items()}
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
        module._forward_pre_hooks.clear()
    return model


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor] = INPUTS, **options: Any) -> list[Tensor]:
    """Return every tensor of the outputs."""
    values = (value if isinstance(value, tuple) else (value,) for value in model(**inputs, **options).values())
    return [tensor for value in values for tensor in value if isinstance(tensor, Tensor)]
