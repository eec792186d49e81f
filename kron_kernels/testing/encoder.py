"""A whole BERT-base-shaped encoder, dense and compressed, on random weights: cost does not depend on the values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..convert.counting import count_parameters
from ..convert.kronify import kronify_
from ..convert.presets import preset
from ..nn import KronEmbedding, KronLinear
from ..schemas.reference import ACTIVATIONS
from .compare import compare
from .interleaving import Timing
from .problem import relative_error

# Largest ||h - h64|| / ||h64|| over the last hidden states: rounding gathered through all layers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A float64 copy of a large batch takes longer than all the timing: so many of its sequences are checked.
CHECKED_SEQUENCES = 4


@dataclass(frozen=True)
class EncoderWay:
    """A way to run an encoder: ``run`` gives the hidden states of token ids ``(batch, sequence)``.

    ``model`` is the module whose float64 copy says what is right, ``tolerance`` how far from it ``run`` may be.
    """

    name: str
    model: nn.Module
    run: Callable[[Tensor], Tensor]
    tolerance: float
    rest_seconds: float = 0.0


class EncoderProblem:
    """Token ids ``(batch, sequence)``, and the float64 hidden states of the models that were asked for them."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._checked = torch.linspace(0, len(ids) - 1, min(len(ids), CHECKED_SEQUENCES)).long()
        self._want: dict[nn.Module, Tensor] = {}

    def refusal(self, _way: EncoderWay) -> str:
        return ""

    def tolerance(self, way: EncoderWay) -> float:
        return way.tolerance

    def error(self, way: EncoderWay) -> float:
        """Relative error against the model in float64, with dense layers in place of Kronecker layers.

        Of a large batch, the first sequence, the last, and some between them are checked.
        """
        if way.model not in self._want:
            self._want[way.model] = forward(reference_copy(way.model), self.ids[self._checked])
        return relative_error(way.run(self.ids)[self._checked], self._want[way.model])

    def runner(self, way: EncoderWay) -> Callable[[], object]:
        return functools.partial(way.run, self.ids)


@dataclass(frozen=True)
class EncoderResult:
    """One model at one input shape. ``timing`` is None where it was not right; ``reason`` says why."""

    name: str
    parameters: int
    error: float | None
    tolerance: float
    timing: Timing | None
    reason: str = ""


def encoders(presets: Sequence[str], dtype: torch.dtype, **sizes: int) -> dict[str, nn.Module]:
    """``{"dense": ..., preset: ...}``: BertModels of BERT-base's configuration, the compressed ones fused.

    Args:
        presets: names for :func:`kron_kernels.convert.presets.preset`.
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
    problem = EncoderProblem(random_ids(models["dense"], batch, sequence))
    ways = [plain_way(name, model) for name, model in models.items()]
    results = compare(problem, ways, seconds=seconds)
    return [
        EncoderResult(way.name, count_parameters(way.model), result.error, way.tolerance, result.timing, result.reason)
        for way, result in zip(ways, results, strict=True)
    ]


def random_ids(model: nn.Module, batch: int, sequence: int) -> Tensor:
    """Token ids ``(batch, sequence)`` of the model's vocabulary, the same ones every time."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return torch.randint(0, vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(0))


def plain_way(name: str, model: nn.Module) -> EncoderWay:
    """The model as it is, held to the tolerance of its dtype."""
    return EncoderWay(name, model, functools.partial(forward, model), TOLERANCE[next(model.parameters()).dtype])


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Last hidden states ``(batch, sequence, hidden)`` of token ids ``(batch, sequence)``, without gradients."""
    with torch.inference_mode():
        return model(ids).last_hidden_state


def encoder_error(model: nn.Module, ids: Tensor) -> float:
    """Relative error of the model's last hidden states against the same model in float64 on the reference backend."""
    return EncoderProblem(ids).error(plain_way("model", model))


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
