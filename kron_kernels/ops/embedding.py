"""``kron_embedding`` for autograd: the op, and as its gradient an op that computes the rows before the norm anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..schemas import reference
from ..schemas.blocks import kron_embedding as embedding_op
from ..schemas.blocks import kron_embedding_backward as backward_op

# Where the tensors of EMBEDDING_GRADIENTS stand among the operands of the op.
_DIFFERENTIABLE = (1, 2, 4, 6, 7, 8)


def is_differentiated_by_ops(backend: str | None, device_type: str) -> bool:
    """Whether a call that autograd follows is ``KronEmbedding``: where both ops have kernels of their own.

    Transforms of torch.func compose with plain torch alone.
    """
    return (
        backends.has_kernel("kron_embedding_backward", device_type)
        and backends.resolve(backend, device_type) != "reference"
        and not torch._C._are_functorch_transforms_active()
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
        if torch.is_grad_enabled():
            # Higher orders: the gradient of the reference, which is differentiable itself.
            operands: tuple[Any, ...] = (*tensors, ctx.eps)
            y = reference.kron_embedding(*operands)
            found = torch.autograd.grad(y, [tensors[place] for place in wanted], grad, create_graph=True)
            for place, gradient in zip(wanted, found, strict=True):
                gradients[place] = gradient
        else:
            mask = sum(1 << bit for bit, place in enumerate(_DIFFERENTIABLE) if place in wanted)
            found = backward_op(grad, *tensors[:8], ctx.eps, mask)
            for bit, place in enumerate(_DIFFERENTIABLE):
                if place in wanted:
                    gradients[place] = found[bit]
        return tuple(gradients)
