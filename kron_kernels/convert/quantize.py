"""Store the large factors of a compressed model as int8, and say what that saves and costs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Int8Factored, KronDecoder, KronEmbedding, KronLinear
from ..nn.factored import KronFactored
from ..nn.int8 import to_int8_
from .agreement import hidden_agreement
from .presets import as_kron_config
from .ties import tie_decoders_


@dataclass(frozen=True)
class LayerQuantization:
    """One layer: bytes of its tensors, and ``||W - W_int8|| / ||W||`` in the Frobenius norm."""

    name: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class QuantizationReport:
    """The quantized layers, and the bytes of the whole model's weights, what is shared once.

    ``agreement`` is the ``hidden_agreement`` of the model before and after, where it was asked for.
    """

    layers: tuple[LayerQuantization, ...]
    bytes_before: int
    bytes_after: int
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


@torch.no_grad()
def quantize_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None = None) -> QuantizationReport:
    """Store the large factors of every Kronecker layer of ``model`` as int8, in place.

    One scale a row of a factor, symmetric, rounded to nearest (``kron_kernels.nn.int8``). Of a linear layer's two
    factors the larger becomes int8, the other too where it has a tenth of their numbers; of an embedding A, one scale
    a token. Tiny factors, biases, norms, position and type embeddings and heads keep their dtype. The int8 factors have
    no gradient any more; the rest can still be trained. A transformers configuration's ``kron`` field records it.
    With ``batches`` (as for ``hidden_agreement``) the report says how well the encoder's outputs agree with those
    before.

    Raises ValueError, and leaves the model as it was, where there is no Kronecker layer, where one is int8 already and
    where a factor is not finite.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (KronLinear, KronEmbedding))}
    _check(layers)
    floating = None if batches is None else copy.deepcopy(model)
    before = {name: weight_bytes(module) for name, module in layers.items()}
    total = weight_bytes(model)
    reports = []
    for name, module in layers.items():
        a, b = module.a.detach(), module.b.detach()
        decoders = _tied_decoders(model, module)
        to_int8_(module)
        if isinstance(module, KronEmbedding):
            tie_decoders_(model, decoders, module)
        error = _relative_error(a, b, module.a, module.b)
        reports.append(LayerQuantization(name, before[name], weight_bytes(module), error))
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "kron", None), Mapping):
        config.kron = replace(as_kron_config(config.kron), weight_dtype="int8").to_dict()
    agreement = None if floating is None or batches is None else hidden_agreement(floating, model, batches)
    return QuantizationReport(tuple(reports), total, weight_bytes(model), agreement)


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's state dict, tensors that share their memory once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _check(layers: Mapping[str, KronFactored]) -> None:
    if not layers:
        raise ValueError("model: expected Kronecker layers (kronify_ makes them), got none")
    for name, module in layers.items():
        if isinstance(module, Int8Factored):
            raise ValueError(f"model: expected factors in floating point, got int8 ones in {name}")
        if type(module) not in (KronLinear, KronEmbedding):
            raise ValueError(f"model: expected {name} to be KronLinear or KronEmbedding, got {type(module).__name__}")
        for factor in (module.a, module.b):
            if not torch.isfinite(factor).all():
                raise ValueError(f"model: expected finite factors, got NaN or inf in {name}")


def _tied_decoders(model: nn.Module, embedding: nn.Module) -> list[str]:
    if not isinstance(embedding, KronEmbedding):
        return []
    decoders = (pair for pair in model.named_modules() if isinstance(pair[1], KronDecoder))
    return [name for name, decoder in decoders if decoder.a is embedding.a]


def _relative_error(a: Tensor, b: Tensor, a_now: Tensor, b_now: Tensor) -> float:
    """``||W - W_now|| / ||W||`` from inner products: <A (x) B, C (x) D> = <A, C> <B, D>; W itself is never built."""
    terms = len(a)
    left, right = (torch.cat(pair).flatten(1).double() for pair in ((a, a_now), (b, b_now)))
    products = (left @ left.T) * (right @ right.T)
    sign = torch.ones(2 * terms, dtype=torch.float64, device=a.device)
    sign[terms:] = -1
    whole = float(products[:terms, :terms].sum())
    return max(float(sign @ products @ sign) / whole, 0.0) ** 0.5 if whole else 0.0
