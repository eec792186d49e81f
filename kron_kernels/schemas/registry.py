"""How an op is registered: schema, fake, vmap rule, and the reference that computes it where no backend does.

Ops know nothing of autograd: ``kron_kernels.ops`` differentiates. They return contiguous tensors. Factors come as
stacks, ``a (S, m1, n1)`` and ``b (S, m2, n2)``. Compiled backends add kernels under their own dispatch keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# The codes of kron::Activation in csrc/include/kron/problem.h.
ACTIVATION_CODES: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}
ACTIVATION_NAMES = {code: name for name, code in ACTIVATION_CODES.items()}
# What transformers calls them. "gelu_new" and "gelu_pytorch_tanh" are one function, spelt out and torch's own.
HUGGING_FACE_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}

# By op, what computes it on any device.
REFERENCES: dict[str, Callable[..., Any]] = {}
# "flexible_layout": the kernels read any strides, so that a compiler need not copy its operands for them.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Register ``kron_kernels::name`` and return its overload. The reference computes with autocast off."""
    qualified = f"kron_kernels::{name}"
    torch.library.define(qualified, schema, tags=_TAGS)
    REFERENCES[name] = _without_autocast(reference)
    torch.library.impl(qualified, "CompositeExplicitAutograd", REFERENCES[name])
    if fake is not None:
        torch.library.register_fake(qualified, fake)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap)
    return getattr(torch.ops.kron_kernels, name).default


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The dtype of an op's result is its inputs', inside autocast too."""

    @functools.wraps(function)
    def computed(first: Tensor, *rest: Any, **named: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest, **named)

    return computed


def needed(needs: int, count: int) -> tuple[bool, ...]:
    """Say which of ``count`` gradients the bits of ``needs`` ask for."""
    return tuple(bool(needs >> index & 1) for index in range(count))


def needs_mask(wanted: Iterable[bool]) -> int:
    """Return the bit mask ``needs`` of a backward op, bit i for the i-th of ``wanted``."""
    return sum(bool(want) << index for index, want in enumerate(wanted))


def only_needed(outputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> Any:
    """Replace what was not asked for by a tensor of shape (0,): a schema cannot return an optional tensor."""
    return tuple(out if need else out.new_empty(0) for out, need in zip(outputs, needs, strict=True))


def samples(size: int, in_dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The operands of each sample of a vmap whose samples have factors, or gradients of them, of their own."""
    for index in range(size):
        yield tuple(
            operand if dim is None else operand.select(dim, index)
            for operand, dim in zip(operands, in_dims, strict=True)
        )


def batched(size: int, in_dims: tuple[int | None, ...], operands: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Tensors with the samples of a vmap as their first dimension: more tokens of one product."""
    for tensor, dim in zip(operands, in_dims, strict=True):
        yield tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
