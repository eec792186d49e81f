"""A frozen linear layer and a trained Kronecker product beside it as one function: results and gradients share memory.

Differentiated apart, the layer and the product each make a gradient of x, which autograd adds up: two tensors of x's
size. Here the product's is added into the layer's, as its result is into the layer's result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from ..schemas.registry import needs_mask
from ..schemas.torch_internals import apply, forward_mode_is_active, is_transformed
from .addmm import (
    RightFactor,
    check_factors,
    fold,
    folding_pays,
    kron_addmm,
    kron_addmm_,
    shrinks_first,
    stacked,
)
from .autocast import autocasts
from .checks import check_alpha, check_frozen, check_low_rank_types, check_types
from .matmul import gradients


def frozen_linear_kron(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: RightFactor, *, alpha: float = 1.0
) -> Tensor:
    """``x @ weight.T + bias + alpha * x @ (sum_s a[s] (x) b[s]).T``, differentiable in ``x``, ``a`` and ``b`` only.

    Args:
        x: ``(..., n1 * n2)``, float32, float64, bfloat16 or float16.
        weight: ``(m1 * m2, n1 * n2)``, and ``bias`` ``(m1 * m2,)`` or None, dtype and device of ``x``. They get no
            gradients.
        a, b, alpha: as for ``kron_addmm``.

    Returns:
        ``(..., m1 * m2)``, contiguous. For backward ``x`` and the factors are kept, and ``weight`` is held.

    Raises:
        ValueError: ``weight`` or ``bias`` of another shape or device, or one that asks for gradients.
        TypeError: one of another dtype. Both also as ``kron_addmm``.

    Differentiable to any order. Inside autocast, a compiler or a function transform it is ``kron_addmm`` of
    ``F.linear``.
    """
    p, q = check_low_rank_types(b)
    check_types(x, a, p, None)
    check_alpha(alpha)
    if is_transformed() or forward_mode_is_active() or autocasts(x.device.type):
        return kron_addmm(F.linear(x, weight, bias), x, a, b, alpha=alpha)
    a, p = stacked(a, p, q)
    check_factors(x, a, p, q)
    m = a.shape[1] * p.shape[1]
    check_frozen("weight", weight, (m, x.shape[-1]), x)
    if bias is not None:
        check_frozen("bias", bias, (m,), x)
    if q is not None and not folding_pays(a, p, q):
        p, q = p @ q, None
    # As a matrix: of batched x, F.linear gives a view.
    y = apply(FrozenLinearKron, x.reshape(-1, x.shape[-1]), weight, bias, a, p, q, alpha)
    return y.view(*x.shape[:-1], m)


def is_plain_frozen(layer: nn.Module) -> bool:
    """Whether calling a layer is ``F.linear`` on its frozen weight and bias and nothing besides: no hook sees it."""
    return (
        type(layer) is nn.Linear
        and _calls_nothing_else(layer, (*_HOOKS, "forward_pre_hooks"))
        and all(type(each) in (Tensor, nn.Parameter) and not each.requires_grad for each in layer.parameters())
        and "weight" in layer._parameters
    )


def is_fresh(layer: Any, result: Any) -> bool:
    """Whether nobody else holds what a layer gave, and its own backward does not need it.

    So it is for torch's plain layers, on plain weights and without hooks that could have kept or exchanged the result.
    """
    return (
        type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d)
        and _calls_nothing_else(layer, _HOOKS)
        and type(layer.weight) in (Tensor, nn.Parameter)
        and (not result._is_view() or result._base.shape == (result.numel() // result.shape[-1], result.shape[-1]))
        and type(result) is Tensor
    )


# The hooks that see a result or its gradient.
_HOOKS = ("forward_hooks", "backward_pre_hooks", "backward_hooks")


def _calls_nothing_else(layer: nn.Module, hooks: tuple[str, ...]) -> bool:
    """Whether a call of the layer is its class's ``forward`` without these kinds of hooks, its own or all modules'."""
    return "forward" not in vars(layer) and not any(
        getattr(layer, f"_{kind}") or getattr(torch_module, f"_global_{kind}") for kind in hooks
    )


class FrozenLinearKron(torch.autograd.Function):
    """``x (T, n), weight (m, n), bias (m,) or None, a (S, m1, n1), p (S, m2, n2) -> (T, m)``; with ``q (r, n2)``, p is
    ``(1, m2, r)``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, p: Tensor, q: Tensor | None, alpha: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, p, q)
        ctx.alpha = alpha
        return kron_addmm_(F.linear(x, weight, bias), x if q is None else fold(x, a, q), a, p, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, p, q = ctx.saved_tensors
        alpha: float = ctx.alpha
        need_x, _, _, need_a, need_p, need_q, _ = ctx.needs_input_grad
        dx = grad @ weight if need_x else None
        dq = None
        after = alpha
        grid = x if q is None else fold(x, a, q)
        if shrinks_first(alpha, x) and (need_a or need_p):
            grid, after = grid * alpha, 1.0
        if q is None:
            if dx is not None:  # dX = G W + alpha sum_s A_s^T G B_s: the same product by the transposed factors
                dx = kron_addmm_(dx, grad, a.mT, p.mT, alpha=alpha)
            _, da, dp, _ = gradients(grad, grid, a, p, needs_mask((False, need_a, need_p)))
        else:
            dh, da, dp, _ = gradients(grad, grid, a, p, needs_mask((need_x or need_q, need_a, need_p)))
            rows = alpha * dh.reshape(-1, q.shape[0])  # (T * n1, r)
            if need_q:
                dq = rows.mT @ x.reshape(-1, q.shape[1])
            if dx is not None:
                dx = dx.view(-1, q.shape[1]).addmm_(rows, q).view(x.shape)
        if after != 1:
            da, dp = after * da, after * dp
        return dx, None, None, da if need_a else None, dp if need_p else None, dq, None
