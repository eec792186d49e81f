"""A whole BERT-base-shaped encoder, dense and compressed, on random weights: cost does not depend on the values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convert import kronify_
from ..counting import count_parameters
from ..nn import KronEmbedding, KronLinear
from ..presets import preset
from ..reference import ACTIVATIONS
from .interleaving import Timing, Variant, interleave

# Largest ||h - h64|| / ||h64|| over the last hidden states: rounding gathered through all layers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class EncoderResult:
    """One model at one input shape. ``timing`` is None where its output is wrong (``error`` above ``tolerance``)."""

    name: str
    parameters: int
    error: float
    tolerance: float
    timing: Timing | None


def encoders(presets: Sequence[str], dtype: torch.dtype, **sizes: int) -> dict[str, nn.Module]:
    """``{"dense": ..., preset: ...}``: BertModels of BERT-base's configuration, the compressed ones fused.

    Args:
        presets: names for :func:`kron_kernels.presets.preset`.
        dtype: of the weights, which are random in every model.
        sizes: fields of transformers' BertConfig to change, ``num_hidden_layers=2`` say.
    """
    from transformers import BertConfig, BertModel

    from ..models import fuse_

    torch.manual_seed(0)
    config = BertConfig(**sizes)  # type: ignore[arg-type]
    models: dict[str, nn.Module] = {"dense": BertModel(config)}
    for name in presets:
        models[name] = BertModel(config)
        kronify_(models[name], preset(name, config.hidden_size, config.intermediate_size), fit=False)
        fuse_(models[name])
    return {name: model.to(dtype).eval() for name, model in models.items()}


def compare_encoders(
    models: Mapping[str, nn.Module], batch: int, sequence: int, *, seconds: float = 2.0
) -> list[EncoderResult]:
    """Check each model against itself in float64, then time those that are right, interleaved, over ``dense``.

    Args:
        models: by name, "dense" among them.
        batch, sequence: shape of the random token ids.
        seconds: time to spend on each.
    """
    dense = models["dense"]
    vocabulary = dense.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(0, vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    errors = {name: encoder_error(model, ids) for name, model in models.items()}
    tolerance = TOLERANCE[next(dense.parameters()).dtype]
    right = {name: model for name, model in models.items() if errors[name] <= tolerance}
    timings: dict[str, Timing] = {}
    if "dense" in right:
        variants = [Variant(name, functools.partial(forward, model, ids)) for name, model in right.items()]
        timings = {timing.name: timing for timing in interleave(variants, "dense", seconds=seconds)}
    return [
        EncoderResult(name, count_parameters(model), errors[name], tolerance, timings.get(name))
        for name, model in models.items()
    ]


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Last hidden states ``(batch, sequence, hidden)`` of token ids ``(batch, sequence)``, without gradients."""
    with torch.inference_mode():
        return model(ids).last_hidden_state


def encoder_error(model: nn.Module, ids: Tensor) -> float:
    """Relative error of the model's last hidden states against the same model in float64 on the reference backend."""
    got = forward(model, ids).double()
    want = forward(reference_copy(model), ids)
    return float((got - want).norm() / want.norm())


def reference_copy(model: nn.Module) -> nn.Module:
    """The model in float64, every Kronecker layer replaced by the dense layer it stands for.

    Without Kronecker layers nothing in it is fused: it computes as transformers does.
    """
    twin = copy.deepcopy(model).double()
    for name, module in list(twin.named_modules()):
        if isinstance(module, KronEmbedding):
            twin.set_submodule(name, module.to_embedding())
        elif isinstance(module, KronLinear):
            twin.set_submodule(name, _DenseTwin(module))
    return twin


class _DenseTwin(nn.Module):
    """The dense layer that a Kronecker layer stands for, its activation included."""

    def __init__(self, layer: KronLinear) -> None:
        super().__init__()
        self.weight = layer.dense_weight().detach()
        self.bias = layer.bias
        self.activation = layer.activation

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.activation is None else ACTIVATIONS[self.activation](y)
