"""Modules whose large tensors are stored in int8 or int4: weights only, products in floating point.

Every 32 values of a row, and those left at its end, share a scale: ``value = integer * scale``. Its sign is such that
the largest magnitude becomes the lowest integer, -128 or -8; the other values are rounded to the nearest. Of int4 a
byte holds two, 8 added to each, the first in the low bits; a row of odd length ends in half a byte. Scales have the
module's dtype: with 16 bits they cost half a bit a value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..schemas.reference import take_rows
from .adaptive import AdaptiveEmbedding, Tables
from .decoder import TiedDecoder
from .embedding import KronEmbedding
from .factored import Shapes
from .linear import KronLinear
from .low_rank import LowRankLinear

WEIGHT_DTYPES = ("int8", "int4")
# Twice as long groups save a quarter of a bit a value; on all-MiniLM-L6-v2 of low rank they cost 1.6 times the error.
GROUP = 32
# A factor with a smaller share of its layer's numbers stays as it is: there is nothing to save, and all of the layer's
# outputs would carry its error.
LEAST_SHARE = 0.1


def check_weight_dtype(weight_dtype: str) -> None:
    """Raise ValueError for what tensors cannot be stored as."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype: expected 'int8' or 'int4', got {weight_dtype!r}")


def quantize(tensor: Tensor, weight_dtype: str) -> tuple[Tensor, Tensor]:
    """Return ``tensor (..., n)`` as integers and scales ``(..., n / 32)``, rounded up, of the tensor's dtype.

    The integers are int8 ``(..., n)`` for "int8", pairs of them as uint8 ``(..., n / 2)``, rounded up, for "int4".
    """
    lowest = -128 if weight_dtype == "int8" else -8
    width = tensor.shape[-1]
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    groups = F.pad(exact, (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / lowest).to(tensor.dtype)
    # Rounded against the scale as it is stored: its own rounding then costs nothing. Zeros have the scale 0.
    steps = torch.where(scale == 0, 1, scale).to(exact.dtype)
    values = (groups / steps).round().clamp(lowest, -1 - lowest).flatten(-2)[..., :width]
    if weight_dtype == "int8":
        return values.to(torch.int8), scale.squeeze(-1)
    pairs = F.pad(values + 8, (0, width % 2)).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] + pairs[..., 1] * 16, scale.squeeze(-1)


def dequantize(values: Tensor, scale: Tensor, width: int) -> Tensor:
    """Return the tensor ``(..., width)`` that ``quantize`` stored, in the dtype of ``scale``."""
    if values.dtype is torch.uint8:
        values = torch.stack([values % 16, values // 16], -1).flatten(-2)[..., :width].to(scale.dtype) - 8
    scales = scale.unsqueeze(-1).expand(*scale.shape, GROUP).flatten(-2)[..., :width]
    return values.to(scale.dtype) * scales


class Quantized(nn.Module):
    """A module some of whose tensors are buffers ``<name>_int8`` or ``<name>_int4`` and ``<name>_scale``.

    They read as ever, in floating point, and have no gradient; what is not stored so stays a parameter. ``quantize_``
    makes these modules of floating-point ones. ``widths`` has the last size of each stored tensor.
    """

    weight_dtype: str
    widths: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored(next(iter(self.widths)))[1].dtype

    def stored(self, name: str) -> tuple[Tensor, Tensor]:
        """The integers of a stored tensor and their scales."""
        return self._buffers[f"{name}_{self.weight_dtype}"], self._buffers[f"{name}_scale"]  # type: ignore[return-value]

    def read(self, name: str) -> Tensor:
        """A tensor in floating point."""
        if name in self.widths:
            return dequantize(*self.stored(name), self.widths[name])
        return nn.Module.__getattr__(self, name)  # type: ignore[return-value]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor has in floating point."""
        if name in self.widths:
            return (*self.stored(name)[0].shape[:-1], self.widths[name])
        return tuple(self.read(name).shape)

    def numel(self) -> int:
        """How many values are stored as integers."""
        return sum(math.prod(self.shape_of(name)) for name in self.widths)

    def reset_parameters(self, *arguments: Any) -> None:
        """Draw as the floating-point module does, and store the result."""
        _in_floating_point(self, "reset_parameters", *arguments)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weight_dtype}={'+'.join(self.widths)}"


def _tensor(name: str) -> Any:
    return property(lambda self: self.read(name), doc=f"{name} in floating point.")


class _QuantizedFactors(Quantized):
    """Kronecker factors of which the large ones are stored so."""

    a, b = _tensor("a"), _tensor("b")

    @property
    def terms(self) -> int:
        return self.shape_of("a")[0]

    @property
    def shapes(self) -> Shapes:
        (_, m1, n1), (_, m2, n2) = self.shape_of("a"), self.shape_of("b")
        return (m1, n1), (m2, n2)

    def load_factors(self, a: Tensor, b: Tensor) -> None:
        _in_floating_point(self, "load_factors", a, b)


class QuantizedKronLinear(_QuantizedFactors, KronLinear):
    """KronLinear with stored large factors; each call converts them to floating point and drops the result."""


class QuantizedKronEmbedding(_QuantizedFactors, KronEmbedding):
    """KronEmbedding with a stored A: a look-up converts the rows that it needs."""

    def gather(self, ids: Tensor) -> list[Tensor]:
        return [_rows(*term, ids, self.widths["a"]) for term in zip(*self.stored("a"), strict=True)]

    def tied_decoder(self, bias: nn.Parameter | None = None) -> TiedDecoder:  # type: ignore[override]
        return TiedDecoder(self, bias)


class QuantizedLowRankLinear(Quantized, LowRankLinear):
    """LowRankLinear with stored factors; each call converts them to floating point and drops the result."""

    u, v = _tensor("u"), _tensor("v")


class QuantizedTables(Quantized, Tables):
    """Stored tables of an adaptive embedding; a look-up converts the rows that it needs."""

    def whole(self, band: int) -> Tensor:
        return self.read(str(band))

    def gather(self, band: int, index: Tensor) -> Tensor:
        return _rows(*self.stored(str(band)), index, self.widths[str(band)])

    def extra_repr(self) -> str:
        return ", ".join(f"{self.weight_dtype} {'x'.join(map(str, self.shape_of(name)))}" for name in self.widths)


class QuantizedAdaptiveEmbedding(AdaptiveEmbedding):
    """AdaptiveEmbedding with stored tables, and with projections in int8: they are few and every token needs them."""

    tables: QuantizedTables

    @property
    def weight_dtype(self) -> str:
        return self.tables.weight_dtype

    def reset_parameters(self, std: float = 1.0) -> None:
        _in_floating_point(self, "reset_parameters", std)


def _rows(values: Tensor, scale: Tensor, index: Tensor, width: int) -> Tensor:
    return dequantize(take_rows(values, index, "ids"), take_rows(scale, index, "ids"), width)


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a module or one in it has tensors stored as integers."""
    return any(isinstance(part, Quantized) for part in module.modules())


_QUANTIZED: dict[type[nn.Module], type[Any]] = {
    KronLinear: QuantizedKronLinear,
    KronEmbedding: QuantizedKronEmbedding,
    LowRankLinear: QuantizedLowRankLinear,
    Tables: QuantizedTables,
    AdaptiveEmbedding: QuantizedAdaptiveEmbedding,
}
_FLOAT: dict[type[nn.Module], type[Any]] = {stored: plain for plain, stored in _QUANTIZED.items()}


def large_tensors(module: nn.Module) -> tuple[str, ...]:
    """Name the tensors that are worth storing: of a Kronecker layer the larger factor, or both if alike; no bias."""
    if isinstance(module, KronEmbedding):
        return ("a",)
    names = [name for name in module._parameters if name != "bias"]
    sizes = {name: module._parameters[name].numel() for name in names}  # type: ignore[union-attr]
    least = LEAST_SHARE * sum(sizes.values()) if isinstance(module, KronLinear) else 0
    return tuple(name for name, size in sizes.items() if size >= least)


@torch.no_grad()
def to_quantized_(module: nn.Module, weight_dtype: str) -> None:
    """Store the large tensors of a factored layer: the module stays the same object and changes its class."""
    if isinstance(module, AdaptiveEmbedding):
        to_quantized_(module.tables, weight_dtype)
        to_quantized_(module.projections, "int8")
    else:
        vars(module).update(weight_dtype=weight_dtype, widths={})
        for name in large_tensors(module):
            tensor: Any = module._parameters.pop(name)
            vars(module)["widths"][name] = tensor.shape[-1]
            for suffix, stored in zip((weight_dtype, "scale"), quantize(tensor, weight_dtype), strict=True):
                module.register_buffer(f"{name}_{suffix}", stored)
    module.__class__ = _QUANTIZED[type(module)]


@torch.no_grad()
def from_quantized_(module: Any) -> None:
    """Convert what ``to_quantized_`` stored back to floating point, in place."""
    if isinstance(module, AdaptiveEmbedding):
        from_quantized_(module.tables)
        from_quantized_(module.projections)
    else:
        for name in list(module.widths):
            tensor = nn.Parameter(module.read(name))
            for suffix in (module.weight_dtype, "scale"):
                del module._buffers[f"{name}_{suffix}"]
            module._parameters[name] = tensor
        del module.weight_dtype, module.widths
    module.__class__ = _FLOAT[type(module)]


def _in_floating_point(module: Any, method: str, *arguments: Any) -> None:
    """Call a method of the floating-point form of a module and store the result."""
    weight_dtype = module.weight_dtype
    from_quantized_(module)
    getattr(module, method)(*arguments)
    to_quantized_(module, weight_dtype)
