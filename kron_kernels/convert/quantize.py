"""Store the large factors of a compressed model as int8 or int4, and say what that saves and costs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import KronDecoder, KronEmbedding
from ..nn.quantized import check_weight_dtype, is_quantized, to_quantized_
from .agreement import hidden_agreement
from .layers import FACTORED
from .presets import as_kron_config
from .ties import tie_decoders_


@dataclass(frozen=True)
class LayerQuantization:
    """One layer: bytes of its tensors, and ``||W - W_stored|| / ||W||`` in the Frobenius norm."""

    name: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class QuantizationReport:
    """The quantized layers, and the bytes of the whole model's weights, what is shared once.

    ``agreement`` is the ``hidden_agreement`` of the model before and after, where it was asked for.
    """

    weight_dtype: str
    layers: tuple[LayerQuantization, ...]
    bytes_before: int
    bytes_after: int
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


@torch.no_grad()
def quantize_(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None = None, weight_dtype: str = "int8"
) -> QuantizationReport:
    """Store the large factors of every factored layer of ``model`` as integers, in place.

    Every 32 values of a row share a scale, in the dtype of the model: convert that first, ``model.to(torch.bfloat16)``
    say, for small files (``kron_kernels.nn.quantized``). Of a Kronecker layer's two factors the larger is stored, the
    other too where it has a tenth of their numbers; of a Kronecker embedding A, of low-rank layers both factors, of
    adaptive embeddings the tables, and the projections in int8. Tiny factors, biases, norms, position and type
    embeddings and heads keep their dtype. What is stored has no gradient any more; the rest can still be trained. A
    transformers configuration's ``kron`` field records it. With ``batches`` (as for ``hidden_agreement``) the report
    says how well the encoder's outputs agree with those before.

    Raises ValueError, and leaves the model as it was, for a ``weight_dtype`` but "int8" and "int4", where there is no
    factored layer, where one is stored as integers already and where a factor is not finite.
    """
    check_weight_dtype(weight_dtype)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, FACTORED)}
    _check(layers)
    floating = None if batches is None else copy.deepcopy(model)
    total = weight_bytes(model)
    reports = []
    for name, module in layers.items():
        before, weight = weight_bytes(module), module.dense_weight()
        decoders = _tied_decoders(model, module)
        to_quantized_(module, weight_dtype)
        if decoders:
            tie_decoders_(model, decoders, module)
        error = float((module.dense_weight() - weight).norm() / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny))
        reports.append(LayerQuantization(name, before, weight_bytes(module), error))
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "kron", None), Mapping):
        config.kron = replace(as_kron_config(config.kron), weight_dtype=weight_dtype).to_dict()
    agreement = None if floating is None or batches is None else hidden_agreement(floating, model, batches)
    return QuantizationReport(weight_dtype, tuple(reports), total, weight_bytes(model), agreement)


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's state dict, tensors that share their memory once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _check(layers: Mapping[str, nn.Module]) -> None:
    if not layers:
        raise ValueError("model: expected factored layers (kronify_ makes them), got none")
    for name, module in layers.items():
        if is_quantized(module):
            raise ValueError(f"model: expected factors in floating point, got stored integers in {name}")
        if type(module) not in FACTORED:
            kinds = ", ".join(kind.__name__ for kind in FACTORED)
            raise ValueError(f"model: expected {name} to be one of {kinds}, got {type(module).__name__}")
        if not all(torch.isfinite(parameter).all() for parameter in module.parameters()):
            raise ValueError(f"model: expected finite factors, got NaN or inf in {name}")


def _tied_decoders(model: nn.Module, embedding: nn.Module) -> list[str]:
    """List the output layers that share the factors of a Kronecker embedding."""
    if not isinstance(embedding, KronEmbedding):
        return []
    decoders = (pair for pair in model.named_modules() if isinstance(pair[1], KronDecoder))
    return [name for name, decoder in decoders if decoder.a is embedding.a]
