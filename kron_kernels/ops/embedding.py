"""``kron_embedding``: rows of a factored table as one op; its gradient computes the rows before the norm again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..schemas import reference
from ..schemas.embedding import kron_embedding as embedding_op
from ..schemas.embedding import kron_embedding_backward as backward_op
from ..schemas.product import stacks
from ..schemas.torch_internals import apply, forward_mode_is_active, functorch_is_active, is_observed
from .checks import check_embedding, check_types
from .route import REJECTED, observed

# Where the tensors of EMBEDDING_GRADIENTS stand among the operands of the op.
_DIFFERENTIABLE = (1, 2, 4, 6, 7, 8)
_HAS_CPU_KERNEL = backends.compiled_by_default("kron_embedding")


def kron_embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    type_ids: Tensor | None = None,
    type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Rows of the table ``sum_s A_s (x) B_s`` for token ids, with BERT's position and type rows and layer norm.

    Args:
        ids: ``(...)``, int64 or int32, each in ``[0, V)``.
        a: ``(S, V, p)`` or ``(V, p)``.
        b: row vectors ``(S, 1, k)`` or ``(1, k)``; a row of the table has ``p * k`` values (Tahaei et al., 2021).
        position_ids, position_weight: indices that broadcast to ``ids``, and a table ``(P, p * k)`` of rows to add.
        type_ids, type_weight: likewise.
        norm_weight, norm_bias, eps: a layer norm of the sum, both ``(p * k,)``.
        backend: as for ``kron_matmul``.

    Returns:
        ``(..., p * k)``, dtype of ``a``.

    Raises:
        IndexError: an index outside its table. Kernels on a GPU, which could raise only by waiting for it, make that
            token's row NaN and give it no gradient.
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a table without its indices.

    Differentiable in the tables, factors and norm; equal gradients on equal input.
    """
    tables = (position_ids, position_weight, type_ids, type_weight)
    differentiable = (a, b, position_weight, type_weight, norm_weight, norm_bias)
    try:
        if _HAS_CPU_KERNEL and backend is None and ids.is_cpu and not is_observed(*differentiable):
            return embedding_op(ids, *stacks(a, b), *tables, norm_weight, norm_bias, eps)
    except REJECTED:
        pass
    if backends.is_unforced(backend):
        names = ("position_ids", "position_weight", "type_ids", "type_weight")
        added = dict(zip(names, tables, strict=True))
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
        return backends.forced(kron_embedding, ids, a, b, **added, **norm, backend=backend)
    check_types(ids, a, b, None)
    a, b = stacks(a, b)
    check_embedding(ids, a, b, *tables, norm_weight, norm_bias)
    if observed(ids, backend, differentiable, autocast=False):
        if is_differentiated_by_ops(backend, ids.device.type):
            return apply(KronEmbedding, ids, a, b, *tables, norm_weight, norm_bias, eps)
        return reference.kron_embedding(ids, a, b, *tables, norm_weight, norm_bias, eps)
    return embedding_op(ids, a, b, *tables, norm_weight, norm_bias, eps)


def is_differentiated_by_ops(backend: str | None, device_type: str) -> bool:
    """Whether a call that autograd follows is ``KronEmbedding``: where both ops have kernels of their own.

    Transforms of torch.func compose with plain torch alone.
    """
    return (
        backends.has_kernel("kron_embedding_backward", device_type)
        and backends.resolve(backend, device_type) != "reference"
        and not functorch_is_active()
        and not forward_mode_is_active()
    )


class KronEmbedding(torch.autograd.Function):
    """``kron_embedding`` around its op: keeps its inputs alone, not the rows that each of its steps makes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, eps = inputs
        ctx.eps = eps
        ctx.save_for_backward(*tensors)
        return embedding_op(*tensors, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = [place for place in _DIFFERENTIABLE if ctx.needs_input_grad[place]]
        gradients: list[Tensor | None] = [None] * (len(tensors) + 1)
        if torch.is_grad_enabled() or forward_mode_is_active():
            # Higher orders: the gradient of the reference, which is differentiable itself.
            operands: tuple[Any, ...] = (*tensors, ctx.eps)
            with torch.enable_grad():
                y = reference.kron_embedding(*operands)
            found = torch.autograd.grad(
                y, [tensors[place] for place in wanted], grad, create_graph=torch.is_grad_enabled()
            )
            for place, gradient in zip(wanted, found, strict=True):
                gradients[place] = gradient
        else:
            mask = sum(1 << bit for bit, place in enumerate(_DIFFERENTIABLE) if place in wanted)
            found = backward_op(grad, *tensors[:8], ctx.eps, mask)
            for bit, place in enumerate(_DIFFERENTIABLE):
                if place in wanted:
                    gradients[place] = found[bit]
        return tuple(gradients)
