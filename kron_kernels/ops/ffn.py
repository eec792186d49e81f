"""``kron_ffn``: a feed-forward block as one op, which keeps its inputs alone for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import select
from ..schemas.ffn import kron_ffn as ffn_op
from ..schemas.ffn import kron_ffn_backward
from ..schemas.product import stacks
from ..schemas.torch_internals import apply, forward_mode_is_active, functorch_is_active, is_observed, needs_autograd
from .autocast import autocasts, cast_for_autocast
from .checks import activation_code, check_ffn, check_norm, check_norm_types, check_types
from .matmul import kron_matmul
from .norm import AddNorm, add_norm
from .route import REJECTED, observed

_HAS_CPU_KERNEL = backends.compiled_by_default("kron_ffn")


def kron_ffn(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "gelu",
    norm: AddNorm | None = None,
    backend: str | None = None,
) -> Tensor:
    """``W2 activation(W1 x + bias1) + bias2`` with ``W_i = sum_s A_i,s (x) B_i,s``: a feed-forward block as one op.

    The block's wide intermediate, ``(..., m)`` with ``m = m1 * m2`` of the first pair ``= n1 * n2`` of the second, is
    never in memory where the factors chain: the grid (m1, m2) of the first pair is the grid (n1, n2) of the second, as
    in KroneckerBERT (Tahaei et al., 2021). Other shapes run as two products.

    Args:
        x: ``(..., n)``, dtypes as for ``kron_matmul``.
        a1, b1: factors of the first layer, matrices or stacks of them; ``bias1 (m,)`` or None.
        a2, b2: factors of the second layer; ``bias2`` or None.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu".
        norm: adds a residual and norms, as :class:`AddNorm` says.
        backend: as for ``kron_matmul``.

    Raises:
        ValueError, TypeError, RuntimeError: as ``kron_matmul``; ValueError for a second pair that does not take what
            the first gives.

    Differentiable to any order. Only the inputs are kept for backward.
    """
    code = activation_code(activation)
    tensors = (x, a1, b1, bias1, a2, b2, bias2)
    everything = tensors if norm is None else (*tensors, *norm[:3])
    try:
        if _HAS_CPU_KERNEL and backend is None and x.is_cpu and not is_observed(*everything):
            pairs = (*stacks(a1, b1), bias1, *stacks(a2, b2), bias2)
            return ffn_op(x, *pairs, code, *(norm or (None, None, None, 0.0)))
    except REJECTED:
        pass
    if backends.is_unforced(backend):
        return backends.forced(kron_ffn, *tensors, activation=activation, norm=norm, backend=backend)
    check_types(x, a1, b1, bias1)
    check_types(x, a2, b2, bias2)
    if norm is not None:
        check_norm_types(norm)
    if observed(x, backend, everything):
        y = _observed_ffn(tensors, activation, backend)
        return y if norm is None else add_norm(norm, x, y)
    (a1, b1), (a2, b2) = stacks(a1, b1), stacks(a2, b2)
    check_ffn(x, a1, b1, bias1, a2, b2, bias2)
    if norm is None:
        return ffn_op(x, a1, b1, bias1, a2, b2, bias2, code, None, None, None, 0.0)
    check_norm(x, a2.shape[1] * b2.shape[1], norm)
    return ffn_op(x, a1, b1, bias1, a2, b2, bias2, code, *norm)


def _observed_ffn(
    tensors: tuple[Any, ...],
    activation: str | None,
    backend: str | None,
) -> Tensor:
    x, a1, b1, bias1, a2, b2, bias2 = tensors
    device_type = x.device.type
    reference_asked = backends.resolve(backend, device_type) == "reference"
    if reference_asked or functorch_is_active() or forward_mode_is_active():
        # Two products, each of which composes with whatever transforms it.
        hidden = kron_matmul(x, a1, b1, bias1, activation=activation, backend=backend)
        return kron_matmul(hidden, a2, b2, bias2, backend=backend)
    if autocasts(device_type):
        x, a1, b1, bias1, a2, b2, bias2 = cast_for_autocast(device_type, *tensors)
    (a1, b1), (a2, b2) = stacks(a1, b1), stacks(a2, b2)
    check_ffn(x, a1, b1, bias1, a2, b2, bias2)
    code = activation_code(activation)
    if not needs_autograd(x, a1, b1, bias1, a2, b2, bias2):
        return ffn_op(x, a1, b1, bias1, a2, b2, bias2, code, None, None, None, 0.0)
    return apply(KronFfn, x, a1, b1, bias1, a2, b2, bias2, activation)


class KronFfn(torch.autograd.Function):
    """``kron_ffn`` around its op; backward recomputes the intermediate."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, activation = inputs
        ctx.activation = activation
        ctx.backend = select.forced()
        ctx.save_for_backward(*tensors)
        return ffn_op(*tensors, activation_code(activation), None, None, None, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with select.force(ctx.backend):
            return KronFfn._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needs = [need and tensor is not None for need, tensor in zip(ctx.needs_input_grad, tensors, strict=False)]
        if torch.is_grad_enabled() or forward_mode_is_active():
            # Higher orders: the gradient of two products, which is differentiable itself. Of aliases: one operand may
            # have been computed from another, and what flows through that is not counted here.
            with torch.enable_grad():
                tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
                x, a1, b1, bias1, a2, b2, bias2 = tensors
                hidden = kron_matmul(x, a1, b1, bias1, activation=ctx.activation)
                y = kron_matmul(hidden, a2, b2, bias2)
            wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
            return (*(next(found) if need else None for need in needs), None)
        mask = sum(need << bit for bit, need in enumerate(needs))
        x, a1, b1, bias1, a2, b2, _ = tensors
        gradients = kron_ffn_backward(grad, x, a1, b1, bias1, a2, b2, activation_code(ctx.activation), mask)
        return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None)
