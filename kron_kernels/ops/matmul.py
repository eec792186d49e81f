"""Public functions: cast, check, choose the backend, and differentiate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import select
from ..schemas import reference
from ..schemas.matmul import MATMUL_GRADIENTS
from ..schemas.matmul import kron_matmul as matmul_op
from ..schemas.matmul import kron_matmul_backward as matmul_backward_op
from ..schemas.product import stacks
from ..schemas.registry import needed, needs_mask
from ..schemas.torch_internals import apply, forward_mode_is_active, functorch_is_active, is_observed, needs_autograd
from .autocast import autocasts, cast_for_autocast
from .checks import activation_code, check_operands, check_types


def kron_matmul(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(x @ (sum_s a[s] (x) b[s]).T + bias)`` without building the Kronecker product.

    A token of ``x`` read row-major as ``X (n1, n2)`` becomes ``sum_s A_s X B_s^T`` read row-major: a linear layer
    whose weight ``(m1 * m2, n1 * n2)`` is a sum of Kronecker products (Tahaei et al., "KroneckerBERT", 2021, eq. 3).

    Args:
        x: ``(..., n1 * n2)``, float32, float64, bfloat16 or float16; any strides, any number of tokens, none too.
        a: left factors, ``(m1, n1)`` or ``(S, m1, n1)``, dtype and device of ``x``.
        b: right factors, ``(m2, n2)`` or ``(S, m2, n2)``, with as many terms as ``a``.
        bias: ``(m1 * m2,)`` or None.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu"; applied last.
        backend: None or "auto" for the best one on ``x``'s device (``KRON_KERNELS_BACKEND`` overrides None), or the
            name of one: "cpu", "cuda", "triton", "reference".

    Returns:
        ``(..., m1 * m2)``, contiguous, dtype of ``x`` (inside autocast: the autocast dtype, as ``F.linear``).

    Raises:
        ValueError: shapes, devices, terms, activation or backend name that do not fit.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: a backend asked for by name that cannot run here.

    Differentiable to any order in ``x``, ``a``, ``b`` and ``bias``; only the inputs are kept for backward.
    """
    check_types(x, a, b, bias)
    code = activation_code(activation)
    on_cpu = x.is_cpu and a.is_cpu and b.is_cpu and (bias is None or bias.is_cpu)
    if backend is None and on_cpu and backends.CPU_BY_DEFAULT and not is_observed(x, a, b, bias):
        try:
            return matmul_op(x, a, b, bias, code)
        except (RuntimeError, ValueError):  # what the op rejects, the checks below name in the caller's terms
            pass
    if backends.is_unforced(backend):
        return backends.forced(kron_matmul, x, a, b, bias, activation=activation, backend=backend)
    a, b = stacks(a, b)
    device_type = "cpu" if x.is_cpu else x.device.type  # faster: a device makes the string of its type in every call
    if autocasts(device_type):
        x, a, b, bias = cast_for_autocast(device_type, x, a, b, bias)
    check_operands(x, a, b, bias)
    if backends.resolve(backend, device_type) == "reference" or forward_mode_is_active():
        return reference.kron_matmul(x, a, b, bias, activation)
    if not needs_autograd(x, a, b, bias):
        return matmul_op(x, a, b, bias, code)
    if torch.compiler.is_compiling() and functorch_is_active():
        # A traced torch.func.grad goes through the forward of a Function and drops its backward, without an error.
        return reference.kron_matmul(x, a, b, bias, activation)
    y = apply(KronMatmul, x, a, b, bias)
    return y if activation is None else reference.ACTIVATIONS[activation](y)


class KronMatmul(torch.autograd.Function):
    """``x (..., n1 * n2), a (S, m1, n1), b (S, m2, n2), bias -> (..., m1 * m2)`` around the op ``kron_matmul``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return matmul_op(x, a, b, bias, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, a, b, _ = inputs
        ctx.save_for_backward(x, a, b)
        ctx.backend = select.forced()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        with select.force(ctx.backend):
            x, a, b = ctx.saved_tensors
            return only_needed(gradients(grad, x, a, b, needs_mask(needs)), needs)


class KronMatmulBackward(torch.autograd.Function):
    """Gradients of ``KronMatmul`` around the op ``kron_matmul_backward``, themselves differentiable to any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return matmul_backward_op(grad, x, a, b, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.needed = needed(inputs[4], len(MATMUL_GRADIENTS))
        ctx.backend = select.forced()

    @staticmethod
    def backward(
        ctx: Any, grad_dx: Tensor, grad_da: Tensor, grad_db: Tensor, grad_dbias: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The product y = K(x, a, b) is linear in each of x, a, b, and <grad_dx, dx> = <grad, K(grad_dx, a, b)>, and so
        on for da and db: the loss is <grad, sum of products with one argument exchanged>, whose gradients are the same
        two ops again, and each product gives none to the argument exchanged.
        """
        with select.force(ctx.backend):
            return KronMatmulBackward._gradients(ctx, (grad_dx, grad_da, grad_db), grad_dbias)

    @staticmethod
    def _gradients(ctx: Any, tangents: tuple[Tensor, ...], grad_dbias: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, a, b = ctx.saved_tensors
        need_grad, *needs = ctx.needs_input_grad[:4]
        total: list[Tensor | None] = [None] * 4
        for position, (asked, tangent) in enumerate(zip(ctx.needed, tangents, strict=False)):
            if not asked:
                continue
            operands = [x, a, b]
            operands[position] = tangent
            if need_grad:
                total[0] = _add(total[0], kron_matmul(*operands))
            wanted = tuple(need and index != position for index, need in enumerate(needs))
            if any(wanted):
                parts = only_needed(gradients(grad, operands[0], operands[1], operands[2], needs_mask(wanted)), wanted)
                total[1:] = [_add(old, part) for old, part in zip(total[1:], parts, strict=True)]
        if need_grad and ctx.needed[3]:
            total[0] = _add(total[0], grad_dbias.expand_as(grad))
        return (*total, None)


def gradients(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int) -> tuple[Tensor, ...]:
    """Of a product's x, a, b and bias, differentiable where that may be asked for; those not needed are empty."""
    if forward_mode_is_active():
        return reference.kron_matmul_backward(grad, x, a, b)
    if torch.is_grad_enabled() or functorch_is_active():
        return apply(KronMatmulBackward, grad, x, a, b, needs)
    return matmul_backward_op(grad, x, a, b, needs)


def only_needed(found: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """None in place of the gradients that are not needed."""
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=False))


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
