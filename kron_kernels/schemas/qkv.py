"""The op ``kron_qkv``: several products of one input; the lists hold one entry a projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import reference
from .pack import reject_packed
from .registry import define


def _reference(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[Tensor]:
    reject_packed(*packed)
    biases: Sequence[Tensor | None] = bias or [None] * len(a)
    return [reference.kron_matmul(x, *factors) for factors in zip(a, b, biases, strict=True)]


def _fake(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *_rest: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], left.shape[1] * right.shape[1]) for left, right in zip(a, b, strict=True)]


kron_qkv = define(
    "kron_qkv",
    "(Tensor x, Tensor[] a, Tensor[] b, Tensor[] bias, Tensor[] packed) -> Tensor[]",
    _reference,
    _fake,
)
