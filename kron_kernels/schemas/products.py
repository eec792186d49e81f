"""The registered ops: schema, fake and reference implementation, vmap rule. Compiled backends add their keys to them.

``kron_matmul`` and ``kron_matmul_backward`` are the one boundary every backend implements. They take
``x (..., n1 * n2)``, stacked factors ``a (S, m1, n1)``, ``b (S, m2, n2)`` and an activation code, return contiguous
tensors, and know nothing of autograd: ``functional.py`` wraps them in an ``autograd.Function``, so that every
transform of torch composes. A gradient that is not needed comes back with shape (0,). ``kron_matmul`` also takes one
pair of matrices as they are: making stacks of them costs as much as a small product. ``packed`` is explained in
``pack.py``. ``kron_addmm`` and, into ``base`` itself, ``kron_addmm_`` add the product to a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference
from .pack import reject_packed
from .product import stacks

# The codes of kron::Activation in csrc/include/kron/problem.h.
ACTIVATION_CODES: dict[str | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}
# What transformers calls them. "gelu_new" and "gelu_pytorch_tanh" are one function, spelt out and torch's own.
HUGGING_FACE_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
# Gradients of kron_matmul_backward, by the bit of `needs` that asks for each.
MATMUL_GRADIENTS = ("x", "a", "b", "bias")
_ACTIVATION_NAMES = {code: name for name, code in ACTIVATION_CODES.items()}

# "flexible_layout": the kernels read any strides, so that a compiler need not copy its operands for them.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

torch.library.define(
    "kron_kernels::kron_matmul",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, int activation, Tensor? packed=None) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "kron_kernels::kron_matmul_backward",
    "(Tensor grad, Tensor x, Tensor a, Tensor b, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "kron_kernels::kron_addmm", "(Tensor base, Tensor x, Tensor a, Tensor b, float alpha) -> Tensor", tags=_TAGS
)
torch.library.define(
    "kron_kernels::kron_addmm_", "(Tensor(a!) base, Tensor x, Tensor a, Tensor b, float alpha) -> ()", tags=_TAGS
)

kron_matmul = torch.ops.kron_kernels.kron_matmul.default
kron_matmul_backward = torch.ops.kron_kernels.kron_matmul_backward.default
kron_addmm = torch.ops.kron_kernels.kron_addmm.default
kron_addmm_ = torch.ops.kron_kernels.kron_addmm_.default


def _kron_matmul_reference(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    reject_packed(packed)
    a, b = stacks(a, b)
    with torch.autocast(x.device.type, enabled=False):  # the op's dtype is its inputs', inside autocast too
        return reference.kron_matmul(x, a, b, bias, _ACTIVATION_NAMES[activation])


def _kron_matmul_backward_reference(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _only_needed(reference.kron_matmul_backward(grad, x, a, b), needed(needs, len(MATMUL_GRADIENTS)))


def _kron_matmul_add_reference(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return reference.kron_addmm(base, x, a, b, alpha)


def _kron_addmm_in_place_reference(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    base.copy_(_kron_matmul_add_reference(base, x, a, b, alpha))


REFERENCES: dict[str, Callable[..., Any]] = {
    "kron_matmul": _kron_matmul_reference,
    "kron_matmul_backward": _kron_matmul_backward_reference,
    "kron_addmm": _kron_matmul_add_reference,
    "kron_addmm_": _kron_addmm_in_place_reference,
}
for _name, _reference in REFERENCES.items():
    torch.library.impl(f"kron_kernels::{_name}", "CompositeExplicitAutograd", _reference)


@torch.library.register_fake("kron_kernels::kron_matmul")
def _kron_matmul_fake(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[-2] * b.shape[-2])


@torch.library.register_fake("kron_kernels::kron_matmul_backward")
def _kron_matmul_backward_fake(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = (x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape), grad.new_empty(grad.shape[-1]))
    return _only_needed(outputs, needed(needs, len(MATMUL_GRADIENTS)))


@torch.library.register_fake("kron_kernels::kron_addmm")
def _kron_matmul_add_fake(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return base.new_empty(base.shape)


@torch.library.register_fake("kron_kernels::kron_addmm_")
def _kron_matmul_add_in_place_fake(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    return None


def needed(needs: int, count: int) -> tuple[bool, ...]:
    """Say which of ``count`` gradients the bits of ``needs`` ask for."""
    return tuple(bool(needs >> index & 1) for index in range(count))


def needs_mask(wanted: Iterable[bool]) -> int:
    """Return the bit mask ``needs`` of a backward op, bit i for the i-th of ``wanted``."""
    return sum(bool(want) << index for index, want in enumerate(wanted))


def _only_needed(outputs: tuple[Tensor, ...], needs: tuple[bool, ...]) -> Any:
    """Replace what was not asked for by a tensor of shape (0,): a schema cannot return an optional tensor."""
    return tuple(out if need else out.new_empty(0) for out, need in zip(outputs, needs, strict=True))


def _unbind(size: int, in_dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The operands of each sample, for what is not just more tokens: factors, or their gradients, of its own."""
    for index in range(size):
        yield tuple(
            operand if dim is None else operand.select(dim, index)
            for operand, dim in zip(operands, in_dims, strict=True)
        )


@torch.library.register_vmap("kron_kernels::kron_matmul")
def _kron_matmul_vmap(
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
    samples = _unbind(info.batch_size, in_dims[:5], (x, a, b, bias, activation))
    return torch.stack([kron_matmul(*sample) for sample in samples]), 0


@torch.library.register_vmap("kron_kernels::kron_addmm")
def _kron_matmul_add_vmap(
    info: Any, in_dims: tuple, base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float
) -> tuple[Tensor, int]:
    if in_dims[2] is None and in_dims[3] is None:
        base, x = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in ((base, in_dims[0]), (x, in_dims[1]))
        )
        return kron_addmm(base, x, a, b, alpha), 0
    samples = _unbind(info.batch_size, in_dims, (base, x, a, b, alpha))
    return torch.stack([kron_addmm(*sample) for sample in samples]), 0


@torch.library.register_vmap("kron_kernels::kron_matmul_backward")
def _kron_matmul_backward_vmap(
    info: Any, in_dims: tuple, grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    asked = needed(needs, len(MATMUL_GRADIENTS))
    out_dims = tuple(0 if need else None for need in asked)
    if in_dims[2] is None and in_dims[3] is None and not any(asked[1:]):
        grad, x = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in ((grad, in_dims[0]), (x, in_dims[1]))
        )
        return kron_matmul_backward(grad, x, a, b, needs), out_dims
    samples = _unbind(info.batch_size, in_dims, (grad, x, a, b, needs))
    columns = zip(*(kron_matmul_backward(*sample) for sample in samples), strict=True)
    return tuple(torch.stack(out) if need else out[0] for out, need in zip(columns, asked, strict=True)), out_dims
