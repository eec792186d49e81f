"""The ops ``kron_matmul`` and ``kron_matmul_backward``: the boundary that every backend implements.

They take ``x (..., n1 * n2)``, stacked factors and an activation code. ``kron_matmul`` also takes one pair of matrices
as they are: making stacks of them costs as much as a small product. ``packed`` is explained in ``pack.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .pack import reject_packed
from .product import stacks
from .registry import ACTIVATION_NAMES, batched, define, needed, only_needed, samples

# What kron_matmul_backward returns, by the bit of ``needs`` that asks for it.
MATMUL_GRADIENTS = ("x", "a", "b", "bias")


def _reference(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    reject_packed(packed)
    return reference.kron_matmul(x, *stacks(a, b), bias, ACTIVATION_NAMES[activation])


def _fake(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[-2] * b.shape[-2])


def _vmap(
    info: Any,
    in_dims: tuple,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: int,
    packed: Tensor | None = None,
) -> tuple[Tensor, int]:
    if in_dims[1] is None and in_dims[2] is None and in_dims[3] is None:
        return kron_matmul(x.movedim(in_dims[0], 0), a, b, bias, activation, packed), 0
    if packed is not None:
        raise ValueError("packed: expected factors shared by all samples of vmap, got a batch of factors or biases")
    each = samples(info.batch_size, in_dims[:5], (x, a, b, bias, activation))
    return torch.stack([kron_matmul(*sample) for sample in each]), 0


kron_matmul = define(
    "kron_matmul",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, int activation, Tensor? packed=None) -> Tensor",
    _reference,
    _fake,
    _vmap,
)


def _backward_reference(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int) -> tuple[Tensor, ...]:
    return only_needed(reference.kron_matmul_backward(grad, x, a, b), needed(needs, len(MATMUL_GRADIENTS)))


def _backward_fake(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int) -> tuple[Tensor, ...]:
    outputs = (x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape), grad.new_empty(grad.shape[-1]))
    return only_needed(outputs, needed(needs, len(MATMUL_GRADIENTS)))


def _backward_vmap(
    info: Any, in_dims: tuple, grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    asked = needed(needs, len(MATMUL_GRADIENTS))
    out_dims = tuple(0 if need else None for need in asked)
    if in_dims[2] is None and in_dims[3] is None and not any(asked[1:]):
        grad, x = batched(info.batch_size, in_dims[:2], (grad, x))
        return kron_matmul_backward(grad, x, a, b, needs), out_dims
    each = samples(info.batch_size, in_dims, (grad, x, a, b, needs))
    columns = zip(*(kron_matmul_backward(*sample) for sample in each), strict=True)
    return tuple(torch.stack(out) if need else out[0] for out, need in zip(columns, asked, strict=True)), out_dims


kron_matmul_backward = define(
    "kron_matmul_backward",
    "(Tensor grad, Tensor x, Tensor a, Tensor b, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    _backward_vmap,
)
