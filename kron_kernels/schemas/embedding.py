"""The ops ``kron_embedding`` and ``kron_embedding_backward``: rows of a table that is a sum of Kronecker products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .registry import define, needed, only_needed

# What kron_embedding_backward returns, by the bit of ``needs`` that asks for it.
EMBEDDING_GRADIENTS = ("a", "b", "position_weight", "type_weight", "norm_weight", "norm_bias")
_TABLES = "Tensor? position_ids, Tensor? position_weight, Tensor? type_ids, Tensor? type_weight, Tensor? norm_weight"


def _fake(ids: Tensor, a: Tensor, b: Tensor, *_rest: Any) -> Tensor:
    return a.new_empty(*ids.shape, a.shape[2] * b.shape[2])


kron_embedding = define(
    "kron_embedding",
    f"(Tensor ids, Tensor a, Tensor b, {_TABLES}, Tensor? norm_bias, float eps) -> Tensor",
    reference.kron_embedding,
    _fake,
)


def _backward_reference(*operands: Any) -> tuple[Tensor, ...]:
    *inputs, needs = operands
    return only_needed(reference.kron_embedding_backward(*inputs), needed(needs, len(EMBEDDING_GRADIENTS)))


def _backward_fake(
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
    return only_needed(tuple(a.new_empty(shape) for shape in shapes), needed(needs, len(EMBEDDING_GRADIENTS)))


kron_embedding_backward = define(
    "kron_embedding_backward",
    f"(Tensor grad, Tensor ids, Tensor a, Tensor b, {_TABLES}, float eps, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)
