"""Modules whose large factors are stored as int8 with one scale a row: weights only, products in floating point.

A row of ``A_s (m1, n1)`` or ``B_s (m2, n2)`` is what one output of that factor's product sums over, so its scale stands
outside the sum; for an embedding, a row of A is a token. ``value = int8 * scale``, the scale such that the largest
magnitude of the row is 127, the integers rounded to nearest.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..schemas.reference import take_rows
from .embedding import KronDecoder, KronEmbedding
from .factored import KronFactored, Shapes
from .linear import KronLinear

# A factor with a smaller share of its layer's numbers stays as it is: there is nothing to save, and all of the layer's
# outputs would carry its error.
LEAST_SHARE = 0.1


def quantize_rows(factor: Tensor) -> tuple[Tensor, Tensor]:
    """``factor (S, m, n)`` as int8 ``(S, m, n)`` and scales ``(S, m)`` of its dtype; a row of zeros has the scale 0."""
    exact = factor.to(torch.promote_types(factor.dtype, torch.float32))
    scale = (exact.abs().amax(-1) / 127).to(factor.dtype)
    # Rounded against the scale as it is stored: its own rounding then costs nothing.
    steps = scale.to(exact.dtype).clamp(min=torch.finfo(exact.dtype).tiny)
    return (exact / steps.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """The factor that ``quantize_rows`` stored, in the dtype of ``scale``."""
    return values.to(scale.dtype) * scale.unsqueeze(-1)


def _factor(name: str) -> Any:
    return property(lambda self: self.float_factor(name), doc=f"The factor {name} in floating point.")


class Int8Factored(KronFactored):
    """Factors of which the large ones are buffers ``<name>_int8 (S, m, n)`` and ``<name>_scale (S, m)``.

    ``a`` and ``b`` read as ever, in floating point. They have no gradient where they are int8; small factors and biases
    stay parameters. ``quantize_`` makes these modules out of floating-point ones.
    """

    a = _factor("a")
    b = _factor("b")

    def float_factor(self, name: str) -> Tensor:
        values = self._buffers.get(f"{name}_int8")
        if values is None:
            return nn.Module.__getattr__(self, name)  # type: ignore[return-value]
        return dequantize_rows(values, cast(Tensor, self._buffers[f"{name}_scale"]))

    def stored_factor(self, name: str) -> Tensor:
        values = self._buffers.get(f"{name}_int8")
        return self._parameters[name] if values is None else values  # type: ignore[return-value]

    @property
    def terms(self) -> int:
        return self.stored_factor("a").shape[0]

    @property
    def shapes(self) -> Shapes:
        (_, m1, n1), (_, m2, n2) = self.stored_factor("a").shape, self.stored_factor("b").shape
        return (m1, n1), (m2, n2)

    @property
    def dtype(self) -> torch.dtype:
        scale = self._buffers.get("b_scale")
        return self.stored_factor("b").dtype if scale is None else scale.dtype

    def factor_names(self) -> tuple[str, ...]:
        return tuple(
            stored
            for name in "ab"
            for stored in ([name] if name in self._parameters else [f"{name}_int8", f"{name}_scale"])
        )

    def init_factors(self, std: float) -> None:
        factor_std = math.sqrt(std / math.sqrt(self.terms))
        self.load_factors(*(torch.empty_like(factor).normal_(std=factor_std) for factor in (self.a, self.b)))

    @torch.no_grad()
    def load_factors(self, a: Tensor, b: Tensor) -> None:
        for name, factor in (("a", a), ("b", b)):
            if name in self._parameters:
                self._parameters[name].copy_(factor)  # type: ignore[union-attr]
                continue
            scale: Any = self._buffers[f"{name}_scale"]
            values, scales = quantize_rows(factor.to(scale.dtype))
            self._buffers[f"{name}_int8"].copy_(values)  # type: ignore[union-attr]
            scale.copy_(scales)

    def factor_repr(self) -> str:
        stored = [name for name in "ab" if self.stored_factor(name).dtype is torch.int8]
        return f"{super().factor_repr()}, int8={'+'.join(stored)}"


class Int8KronLinear(Int8Factored, KronLinear):
    """KronLinear with its large factors in int8; each call converts them to floating point and drops the result."""


class Int8KronEmbedding(Int8Factored, KronEmbedding):
    """KronEmbedding with A in int8: a look-up gathers int8 rows and scales them, the table stays int8 in memory."""

    def gather(self, ids: Tensor) -> list[Tensor]:
        values, scale = self._buffers["a_int8"], self._buffers["a_scale"]
        return [
            take_rows(rows, ids, "ids").to(scales.dtype) * take_rows(scales.unsqueeze(-1), ids, "ids")
            for rows, scales in zip(values, scale, strict=True)  # type: ignore[arg-type]
        ]

    def reset_parameters(self, std: float = 1.0) -> None:
        super().reset_parameters(std)
        if self.padding_idx is not None:
            self._buffers["a_int8"][:, self.padding_idx].zero_()  # type: ignore[index]

    def tied_decoder(self, bias: nn.Parameter | None = None) -> Int8KronDecoder:
        return Int8KronDecoder(self, bias)


class Int8KronDecoder(Int8Factored, KronDecoder):
    """KronDecoder of an Int8KronEmbedding; each call converts A to floating point and drops the result.

    It reads the embedding's factors and has none of its own: its state dict holds the bias, if there is one.
    """

    embedding: Int8KronEmbedding

    def __init__(self, embedding: Int8KronEmbedding, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        # Not as a submodule: the model has the embedding elsewhere.
        vars(self)["embedding"] = embedding
        self.bias = bias

    def float_factor(self, name: str) -> Tensor:
        return self.embedding.float_factor(name)

    def stored_factor(self, name: str) -> Tensor:
        return self.embedding.stored_factor(name)

    def factor_names(self) -> tuple[str, ...]:
        return ()


def large_factors(module: KronFactored) -> tuple[str, ...]:
    """Which of a module's factors are worth int8: an embedding's A; of a linear layer the larger, or both if alike."""
    if not isinstance(module, KronLinear):
        return ("a",)
    sizes = {name: math.prod(shape) for name, shape in zip("ab", module.shapes, strict=True)}
    return tuple(name for name, size in sizes.items() if size >= LEAST_SHARE * sum(sizes.values()))


_INT8: dict[type[nn.Module], type[Int8Factored]] = {KronLinear: Int8KronLinear, KronEmbedding: Int8KronEmbedding}


@torch.no_grad()
def to_int8_(module: KronLinear | KronEmbedding) -> None:
    """Store the large factors of ``module`` in int8: the module stays the same object and changes its class."""
    quantized = {name: quantize_rows(getattr(module, name)) for name in large_factors(module)}
    for name, (values, scale) in quantized.items():
        del module._parameters[name]
        module.register_buffer(f"{name}_int8", values)
        module.register_buffer(f"{name}_scale", scale)
    module.__class__ = _INT8[type(module)]  # type: ignore[assignment]


@torch.no_grad()
def from_int8_(module: Int8Factored) -> None:
    """Convert an int8-stored module back to floating point in place; an Int8KronDecoder after its embedding."""
    if isinstance(module, Int8KronDecoder):
        embedding: Any = vars(module).pop("embedding")
        factors = (embedding.a, embedding.b)
    else:
        factors = (module.a, module.b)
        for name in module.factor_names():
            module._buffers.pop(name, None)
    module.__class__ = _FLOAT[type(module)]
    for name, factor in zip("ab", factors, strict=True):
        module._parameters[name] = factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor)


_FLOAT: dict[type[nn.Module], Any] = {Int8KronDecoder: KronDecoder, **{int8: plain for plain, int8 in _INT8.items()}}
