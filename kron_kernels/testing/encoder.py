"""A BERT-base-sized encoder, dense and compressed, on random weights: cost does not depend on the values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convert.kronify import kronify_
from ..convert.layers import EMBEDDINGS, LINEARS
from ..convert.presets import preset
from ..nn import KronLinear, LowRankLinear
from ..schemas.reference import ACTIVATIONS
from .problems import relative_error

# Largest ||h - h64|| / ||h64|| over the last hidden states: rounding gathered through all layers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A float64 copy of a large batch takes longer than all the timing: so many of its sequences are checked.
CHECKED_SEQUENCES = 4


@dataclass(frozen=True)
class EncoderCandidate:
    """One form of an encoder to time: ``run`` gives hidden states (batch, sequence, hidden) of token ids.

    ``model`` is the module whose float64 copy says what is right; ``tolerance`` how far from it ``run`` may be.
    """

    name: str
    model: nn.Module
    run: Callable[[Tensor], Tensor]
    tolerance: float
    rest_seconds: float = 0.0


class EncoderProblem:
    """Token ids (batch, sequence), and the float64 hidden states of each model, computed once."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._checked = torch.linspace(0, len(ids) - 1, min(len(ids), CHECKED_SEQUENCES)).long()
        self._want: dict[nn.Module, Tensor] = {}

    def tolerance(self, candidate: EncoderCandidate) -> float:
        return candidate.tolerance

    def error(self, candidate: EncoderCandidate) -> float:
        """Return the relative error against the model in float64 with dense layers, over a few of the sequences."""
        if candidate.model not in self._want:
            self._want[candidate.model] = forward(reference_copy(candidate.model), self.ids[self._checked])
        return relative_error(candidate.run(self.ids)[self._checked], self._want[candidate.model])

    def runner(self, candidate: EncoderCandidate) -> Callable[[], object]:
        return functools.partial(candidate.run, self.ids)


def encoders(presets: Sequence[str], dtype: torch.dtype, **sizes: int) -> dict[str, nn.Module]:
    """Return ``{"dense": ..., preset: ...}``: BertModels of BERT-base's configuration, the compressed ones fused.

    ``sizes`` are fields of transformers' BertConfig to change.
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


def random_ids(model: nn.Module, batch: int, sequence: int) -> Tensor:
    """Return token ids (batch, sequence) of the model's vocabulary, the same ones every time."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return torch.randint(0, vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(0))


def as_it_is(name: str, model: nn.Module) -> EncoderCandidate:
    """Return the model itself as a candidate, held to the tolerance of its dtype."""
    return EncoderCandidate(name, model, functools.partial(forward, model), TOLERANCE[next(model.parameters()).dtype])


def inference_form(name: str, model: nn.Module) -> EncoderCandidate:
    """Return the inference form of a compressed model as a candidate; the model itself stays as it is."""
    from ..models import optimize_for_inference

    run = functools.partial(forward, optimize_for_inference(copy.deepcopy(model)))
    return EncoderCandidate(name, model, run, TOLERANCE[next(model.parameters()).dtype])


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the last hidden states (batch, sequence, hidden) of token ids, without gradients."""
    with torch.inference_mode():
        return model(ids).last_hidden_state


def reference_copy(model: nn.Module) -> nn.Module:
    """Return the model in float64 with every Kronecker layer replaced by its dense one, so that nothing is fused."""
    twin = copy.deepcopy(model).double()
    for name, module in list(twin.named_modules()):
        if isinstance(module, EMBEDDINGS):
            twin.set_submodule(name, module.to_embedding())
        elif isinstance(module, LINEARS):
            twin.set_submodule(name, _DenseTwin(module))
    return twin


class _DenseTwin(nn.Module):
    """The dense layer that a Kronecker layer stands for, its activation included."""

    def __init__(self, layer: KronLinear | LowRankLinear) -> None:
        super().__init__()
        self.weight = layer.dense_weight().detach()
        self.bias = layer.bias
        self.activation = getattr(layer, "activation", None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.activation is None else ACTIVATIONS[self.activation](y)
