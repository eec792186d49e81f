"""The ops ``kron_ffn`` and ``kron_ffn_backward``: a feed-forward block, two products with an activation between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .pack import reject_packed
from .registry import ACTIVATION_NAMES, define, needed, only_needed

# What kron_ffn_backward returns, by the bit of ``needs`` that asks for it.
FFN_GRADIENTS = ("x", "a1", "b1", "bias1", "a2", "b2", "bias2")
_FACTORS_1, _FACTORS_2 = (f"Tensor a{i}, Tensor b{i}, Tensor? bias{i}" for i in (1, 2))


def _reference(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    activation: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    packed1: Tensor | None = None,
    packed2: Tensor | None = None,
) -> Tensor:
    reject_packed(packed1, packed2)
    y = reference.kron_ffn(x, a1, b1, bias1, a2, b2, bias2, ACTIVATION_NAMES[activation])
    if residual is None or norm_weight is None:
        return y
    return reference.add_norm(y, residual, norm_weight, norm_bias, eps)


def _fake(
    x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, *_rest: Any, **_packed: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a2.shape[1] * b2.shape[1])


kron_ffn = define(
    "kron_ffn",
    f"(Tensor x, {_FACTORS_1}, {_FACTORS_2}, int activation, Tensor? residual, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? packed1=None, Tensor? packed2=None) -> Tensor",
    _reference,
    _fake,
)


def _backward_reference(grad: Tensor, x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    a1, b1, bias1, a2, b2, activation, needs = operands
    outputs = reference.kron_ffn_backward(grad, x, a1, b1, bias1, a2, b2, ACTIVATION_NAMES[activation])
    return only_needed(outputs, needed(needs, len(FFN_GRADIENTS)))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    hidden, out = a1.shape[1] * b1.shape[1], a2.shape[1] * b2.shape[1]
    shapes = (x.shape, a1.shape, b1.shape, (hidden,), a2.shape, b2.shape, (out,))
    return only_needed(tuple(x.new_empty(shape) for shape in shapes), needed(needs, len(FFN_GRADIENTS)))


kron_ffn_backward = define(
    "kron_ffn_backward",
    f"(Tensor grad, Tensor x, {_FACTORS_1}, Tensor a2, Tensor b2, int activation, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)
