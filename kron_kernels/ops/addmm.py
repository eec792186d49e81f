"""Products added to a tensor: ``base + alpha * (sum_s A_s (x) B_s) x``, as adapters beside a frozen layer need it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..backends import select
from ..schemas import reference
from ..schemas.addmm import kron_addmm as addmm_op
from ..schemas.addmm import kron_addmm_ as addmm_op_
from ..schemas.product import stacks
from ..schemas.reference import order_cost
from ..schemas.registry import needs_mask
from ..schemas.torch_internals import apply, forward_mode_is_active, functorch_is_active, is_transformed, needs_autograd
from .autocast import autocasts, cast_for_autocast
from .checks import (
    check_alpha,
    check_base,
    check_low_rank,
    check_low_rank_types,
    check_operands,
    check_types,
)
from .matmul import gradients, only_needed

RightFactor = Tensor | tuple[Tensor, Tensor]


def kron_addmm(
    base: Tensor, x: Tensor, a: Tensor, b: RightFactor, *, alpha: float = 1.0, backend: str | None = None
) -> Tensor:
    """``base + alpha * x @ (sum_s a[s] (x) b[s]).T`` in one pass, as ``torch.addmm`` is for a plain product.

    The adapters LoKr (Yeh et al., "Navigating Text-To-Image Customization", 2023) and KronA (Edalati et al., 2022)
    have this form: ``base`` is what the frozen layer gives.

    Args:
        base: ``(..., m1 * m2)``, with the leading sizes, dtype and device of ``x``; any strides.
        x: ``(..., n1 * n2)``, float32, float64, bfloat16 or float16; any strides, any number of tokens, none too.
        a: left factors, ``(m1, n1)`` or ``(S, m1, n1)``, dtype and device of ``x``.
        b: right factors, ``(m2, n2)`` or ``(S, m2, n2)``, with as many terms as ``a``; or a pair ``(p, q)`` of matrices
            ``(m2, r)`` and ``(r, n2)`` whose product is the right factor. It is formed only where that is cheaper.
        alpha: factor of the product, a number.
        backend: as for ``kron_matmul``.

    Returns:
        ``(..., m1 * m2)``, contiguous, dtype of ``x`` (inside autocast: the autocast dtype, as ``torch.addmm``).

    Raises:
        ValueError, TypeError, RuntimeError: as ``kron_matmul``.

    Differentiable to any order in all tensors; only ``x`` and the factors are kept for backward.
    """
    if backends.is_unforced(backend):
        return backends.forced(kron_addmm, base, x, a, b, alpha=alpha, backend=backend)
    base, x, a, b, name = _prepare(base, x, a, b, alpha, backend, in_place=False)
    if name == "reference" or forward_mode_is_active():
        return reference.kron_addmm(base, x, a, b, alpha)
    if not needs_autograd(base, x, a, b):
        return addmm_op(base, x, a, b, alpha)
    if torch.compiler.is_compiling() and functorch_is_active():
        return reference.kron_addmm(base, x, a, b, alpha)  # as in kron_matmul
    return apply(KronAddmm, base, x, a, b, alpha)


def kron_addmm_(
    base: Tensor, x: Tensor, a: Tensor, b: RightFactor, *, alpha: float = 1.0, backend: str | None = None
) -> Tensor:
    """``kron_addmm`` written into ``base``, which is returned: no tensor of the result's size is made.

    ``base`` may not be a leaf that needs gradients, nor what backward of another operation needs, as for every in-place
    operation of torch. Inside autocast ``base`` must have the autocast dtype. Where ``base`` is not contiguous, of a
    subclass of Tensor, or part of the memory of an operand, and under a compiler or a function transform, the result
    takes memory of its own first.
    """
    if backends.is_unforced(backend):
        return backends.forced(kron_addmm_, base, x, a, b, alpha=alpha, backend=backend)
    base, x, a, b, name = _prepare(base, x, a, b, alpha, backend, in_place=True)
    plain = type(base) in (Tensor, torch.nn.Parameter)  # a subclass, such as a fake tensor, may have no memory
    if (
        name == "reference"
        or is_transformed()
        or forward_mode_is_active()
        or not plain
        or not base.is_contiguous()
        or base.is_neg()
        or _shares_memory(base, x, a, b)
    ):
        return base.copy_(kron_addmm(base, x, a, b, alpha=alpha, backend=name))
    if needs_autograd(base, x, a, b):
        return apply(KronAddmmInPlace, base, x, a, b, alpha)
    addmm_op_(base, x, a, b, alpha)
    if not base.is_inference():
        torch.autograd.graph.increment_version(base)  # as torch's own do: a backward that needs what was here fails
    return base


class KronAddmm(torch.autograd.Function):
    """``base (..., m1 * m2), x (..., n1 * n2), a (S, m1, n1), b (S, m2, n2) -> base + alpha * product``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        return addmm_op(base, x, a, b, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, a, b, ctx.alpha = inputs
        ctx.save_for_backward(x, a, b)
        ctx.backend = select.forced()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """alpha goes to the smaller factor, not to a copy of ``grad``: that factor's own gradient lacks it."""
        x, a, b = ctx.saved_tensors
        alpha, needs = ctx.alpha, ctx.needs_input_grad[:4]
        if not any(needs[1:]):
            return grad, None, None, None, None
        dbase = grad if needs[0] else None
        if shrinks_first(alpha, grad) and needs[2] and needs[3]:
            grad, alpha = grad * alpha, 1.0
        # Of a factor that asks for no gradient, if there is one: none lacks alpha then.
        to_a = a.numel() <= b.numel() if needs[2] == needs[3] else needs[3]
        if alpha != 1:
            a, b = (a * alpha, b) if to_a else (a, b * alpha)
        with select.force(ctx.backend):
            dx, da, db = only_needed(gradients(grad, x, a, b, needs_mask(needs[1:])), needs[1:])
        if alpha != 1 and da is not None and db is not None:
            da, db = (da * alpha, db) if to_a else (da, db * alpha)
        return dbase, dx, da, db, None


class KronAddmmInPlace(torch.autograd.Function):
    """``KronAddmm`` into ``base``."""

    backward = staticmethod(KronAddmm.backward)

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        ctx.save_for_backward(x, a, b)
        ctx.backend = select.forced()
        ctx.mark_dirty(base)
        addmm_op_(base, x, a, b, alpha)
        return base


def _prepare(
    base: Any, x: Any, a: Any, b: Any, alpha: Any, backend: str | None, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Checked and cast operands with stacked factors, the low-rank factor folded, and the name of the backend."""
    p, q = check_low_rank_types(b)
    check_types(x, a, p, None)
    check_alpha(alpha)
    device_type = x.device.type
    if autocasts(device_type):
        x, a, p, q = cast_for_autocast(device_type, x, a, p, q)
        if not in_place:
            (base,) = cast_for_autocast(device_type, base)
    a, p = stacked(a, p, q)
    check_factors(x, a, p, q)
    if q is not None:
        x, p = (fold(x, a, q), p) if folding_pays(a, p, q) else (x, p @ q)
    check_base(base, x, a.shape[1] * p.shape[1])
    return base, x, a, p, backends.resolve(backend, device_type)


def shrinks_first(alpha: float, tensor: Tensor) -> bool:
    """Whether alpha goes to an operand of sums over tokens: in half precision they may overflow before it."""
    return abs(alpha) < 1 and tensor.element_size() == 2


def stacked(a: Tensor, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """``stacks``; beside ``q``, of a low-rank factor, each matrix is one term by itself."""
    if q is None:
        return stacks(a, p)
    return (a.unsqueeze(0) if a.dim() == 2 else a), (p.unsqueeze(0) if p.dim() == 2 else p)


def check_factors(x: Tensor, a: Tensor, p: Tensor, q: Tensor | None) -> None:
    """Check ``x (..., n1 * n2)`` against stacked factors, where ``q (r, n2)`` is given of low rank."""
    if q is None:
        check_operands(x, a, p, None)
        return
    check_low_rank(a, p, q)
    check_operands(x, a, q[:1, :1].expand(1, p.shape[1], q.shape[1]), None)  # a stand-in of p q, for its shape


def folding_pays(a: Tensor, p: Tensor, q: Tensor) -> bool:
    """Whether ``(a (x) p)(I (x) q)`` takes fewer multiply-adds than ``a (x) (p q)``."""
    (_, m1, n1), (_, m2, rank), n2 = a.shape, p.shape, q.shape[1]
    return n1 * n2 * rank + min(order_cost(m1, n1, m2, rank)) < min(order_cost(m1, n1, m2, n2))


def fold(x: Tensor, a: Tensor, q: Tensor) -> Tensor:
    """``(I (x) q) x``: each of a token's n1 rows from n2 to r values, ``(..., n1 * n2) -> (..., n1 * r)``."""
    return F.linear(x.unflatten(-1, (a.shape[2], q.shape[1])), q).flatten(-2)


def _shares_memory(base: Tensor, *operands: Tensor) -> bool:
    try:
        storage = base.untyped_storage().data_ptr()
        return any(operand.untyped_storage().data_ptr() == storage for operand in operands) and base.numel() > 0
    except NotImplementedError:  # in is_grads_batched a tensor has no storage to compare or to write into
        return True
