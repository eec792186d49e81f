"""The registered ops that compute more than one product: whole blocks of a transformer, and packed factors.

As in ``_ops.py``, they know nothing of autograd: ``fused.py`` differentiates. Factors come stacked, ``a (S, m1, n1)``
and ``b (S, m2, n2)``. An operand ``packed`` is what ``kron_pack`` made of a pair of factors, or None: it saves the
kernels the time of bringing the factors into their own layout, and changes no result. Lists hold one entry a
projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .pack import reject_packed
from .product import stacks
from .products import _ACTIVATION_NAMES, _TAGS, _only_needed, _unbind, needed

_FACTORS_1, _FACTORS_2 = (f"Tensor a{i}, Tensor b{i}, Tensor? bias{i}" for i in (1, 2))
_SCHEMAS = {
    "kron_pack": "(Tensor a, Tensor b) -> Tensor",
    "kron_matmul_norm": "(Tensor x, Tensor a, Tensor b, Tensor? bias, Tensor residual, Tensor norm_weight, "
    "Tensor norm_bias, float eps, Tensor? packed=None) -> Tensor",
    "kron_mm_int8": "(Tensor x, Tensor a, Tensor b) -> (Tensor, Tensor)",
    "kron_ffn": f"(Tensor x, {_FACTORS_1}, {_FACTORS_2}, int activation, Tensor? residual, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? packed1=None, Tensor? packed2=None) -> Tensor",
    "kron_ffn_backward": f"(Tensor grad, Tensor x, {_FACTORS_1}, Tensor a2, Tensor b2, int activation, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "kron_qkv": "(Tensor x, Tensor[] a, Tensor[] b, Tensor[] bias, Tensor[] packed) -> Tensor[]",
    "kron_embedding": "(Tensor ids, Tensor a, Tensor b, Tensor? position_ids, Tensor? position_weight, "
    "Tensor? type_ids, Tensor? type_weight, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    "kron_embedding_backward": "(Tensor grad, Tensor ids, Tensor a, Tensor b, Tensor? position_ids, "
    "Tensor? position_weight, Tensor? type_ids, Tensor? type_weight, Tensor? norm_weight, float eps, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"kron_kernels::{_name}", _schema, tags=_TAGS)

kron_pack = torch.ops.kron_kernels.kron_pack.default
kron_matmul_norm = torch.ops.kron_kernels.kron_matmul_norm.default
kron_mm_int8 = torch.ops.kron_kernels.kron_mm_int8.default
kron_ffn = torch.ops.kron_kernels.kron_ffn.default
kron_ffn_backward = torch.ops.kron_kernels.kron_ffn_backward.default
kron_qkv = torch.ops.kron_kernels.kron_qkv.default
kron_embedding = torch.ops.kron_kernels.kron_embedding.default
kron_embedding_backward = torch.ops.kron_kernels.kron_embedding_backward.default

# Gradients of kron_ffn_backward and kron_embedding_backward, by the bit of `needs` that asks for each.
FFN_GRADIENTS = ("x", "a1", "b1", "bias1", "a2", "b2", "bias2")
EMBEDDING_GRADIENTS = ("a", "b", "position_weight", "type_weight", "norm_weight", "norm_bias")


def _kron_pack_reference(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(0, dtype=torch.uint8)  # the reference has no layout of its own


def _kron_matmul_norm_reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    packed: Tensor | None = None,
) -> Tensor:
    reject_packed(packed)
    with torch.autocast(x.device.type, enabled=False):
        return reference.kron_matmul_norm(x, a, b, bias, residual, norm_weight, norm_bias, eps)


def _kron_mm_int8_reference(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = stacks(a, b)
    with torch.autocast(x.device.type, enabled=False):
        return reference.kron_mm_int8(x, a, b)


def _kron_ffn_reference(
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
    name = _ACTIVATION_NAMES[activation]
    with torch.autocast(x.device.type, enabled=False):
        y = reference.kron_ffn(x, a1, b1, bias1, a2, b2, bias2, name)
        if residual is None or norm_weight is None:
            return y
        return torch.nn.functional.layer_norm(residual + y, norm_weight.shape, norm_weight, norm_bias, eps)


def _kron_ffn_backward_reference(
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
    with torch.autocast(x.device.type, enabled=False):
        outputs = reference.kron_ffn_backward(grad, x, a1, b1, bias1, a2, b2, _ACTIVATION_NAMES[activation])
        return _only_needed(outputs, needed(needs, len(FFN_GRADIENTS)))


def _kron_qkv_reference(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[Tensor]:
    reject_packed(*packed)
    biases: Sequence[Tensor | None] = bias or [None] * len(a)
    with torch.autocast(x.device.type, enabled=False):
        return [reference.kron_matmul(x, *factors) for factors in zip(a, b, biases, strict=True)]


def _kron_embedding_reference(ids: Tensor, *operands: Any) -> Tensor:
    with torch.autocast(ids.device.type, enabled=False):
        return reference.kron_embedding(ids, *operands)


def _kron_embedding_backward_reference(
    grad: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    needs: int,
) -> tuple[Tensor, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        outputs = reference.kron_embedding_backward(
            grad, ids, a, b, position_ids, position_weight, type_ids, type_weight, norm_weight, eps
        )
        return _only_needed(outputs, needed(needs, len(EMBEDDING_GRADIENTS)))


REFERENCES: dict[str, Callable[..., Any]] = {name: globals()[f"_{name}_reference"] for name in _SCHEMAS}
for _name, _reference in REFERENCES.items():
    torch.library.impl(f"kron_kernels::{_name}", "CompositeExplicitAutograd", _reference)


@torch.library.register_fake("kron_kernels::kron_matmul_norm")
def _kron_matmul_norm_fake(x: Tensor, a: Tensor, b: Tensor, *_rest: Any, **_packed: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[1] * b.shape[1])


@torch.library.register_fake("kron_kernels::kron_mm_int8")
def _kron_mm_int8_fake(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    q = x.new_empty(*rows, a.shape[-2] * b.shape[-2], dtype=torch.int8)
    return q, x.new_empty(*rows, 1, dtype=torch.float32)


@torch.library.register_vmap("kron_kernels::kron_mm_int8")
def _kron_mm_int8_vmap(
    info: Any, in_dims: tuple, x: Tensor, a: Tensor, b: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if in_dims[1] is None and in_dims[2] is None:
        return kron_mm_int8(x.movedim(in_dims[0], 0), a, b), (0, 0)
    q, scale = zip(*(kron_mm_int8(*sample) for sample in _unbind(info.batch_size, in_dims, (x, a, b))), strict=True)
    return (torch.stack(q), torch.stack(scale)), (0, 0)


@torch.library.register_fake("kron_kernels::kron_ffn")
def _kron_ffn_fake(
    x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, *_rest: Any, **_packed: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a2.shape[1] * b2.shape[1])


@torch.library.register_fake("kron_kernels::kron_ffn_backward")
def _kron_ffn_backward_fake(
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
    return _only_needed(tuple(x.new_empty(shape) for shape in shapes), needed(needs, len(FFN_GRADIENTS)))


@torch.library.register_fake("kron_kernels::kron_qkv")
def _kron_qkv_fake(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *_rest: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], left.shape[1] * right.shape[1]) for left, right in zip(a, b, strict=True)]


@torch.library.register_fake("kron_kernels::kron_embedding")
def _kron_embedding_fake(ids: Tensor, a: Tensor, b: Tensor, *_rest: Any) -> Tensor:
    return a.new_empty(*ids.shape, a.shape[2] * b.shape[2])


@torch.library.register_fake("kron_kernels::kron_embedding_backward")
def _kron_embedding_backward_fake(
    grad: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    needs: int,
) -> tuple[Tensor, ...]:
    tables = (position_weight, type_weight, norm_weight, norm_weight)
    shapes = (a.shape, b.shape, *((0,) if table is None else table.shape for table in tables))
    return _only_needed(tuple(a.new_empty(shape) for shape in shapes), needed(needs, len(EMBEDDING_GRADIENTS)))
