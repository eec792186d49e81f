"""The op ``kron_matmul_norm``: a product with the end of its block, a residual and a layer norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .pack import reject_packed
from .registry import define


def _reference(x: Tensor, *operands: Any, packed: Tensor | None = None) -> Tensor:
    reject_packed(packed, *operands[7:])
    return reference.kron_matmul_norm(x, *operands[:7])


def _fake(x: Tensor, a: Tensor, b: Tensor, *_rest: Any, **_packed: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1])


kron_matmul_norm = define(
    "kron_matmul_norm",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor? packed=None) -> Tensor",
    _reference,
    _fake,
)
