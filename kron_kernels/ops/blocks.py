"""Public functions for whole blocks of a transformer: feed-forward, projections of one input, embedding, add and norm.

Each is one op on the CPU, where the intermediate of the block stays in cache. Asked for gradients, ``kron_ffn`` keeps
its inputs only and computes its middle anew, and on a GPU so does ``kron_embedding``; the others are then compositions
of ``kron_matmul`` and torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..backends import select
from ..schemas import reference
from ..schemas.blocks import kron_embedding as embedding_op
from ..schemas.blocks import kron_ffn as ffn_op
from ..schemas.blocks import kron_ffn_backward, kron_pack
from ..schemas.blocks import kron_matmul_norm as matmul_norm_op
from ..schemas.blocks import kron_qkv as qkv_op
from ..schemas.product import stacks
from .checks import (
    activation_code,
    check_embedding,
    check_ffn,
    check_norm,
    check_norm_types,
    check_projections,
    check_types,
)
from .embedding import KronEmbedding, is_differentiated_by_ops
from .matmul import kron_matmul
from .observers import apply, autocasts, cast_for_autocast, is_observed, needs_autograd

# Ops with a compiled kernel check their operands themselves: a call that nothing observes goes straight to them, and
# what they refuse, or what is no tensor, is then named in the caller's terms by the checks here.
_NORM_IS_QUICK, _FFN_IS_QUICK, _QKV_IS_QUICK, _EMBEDDING_IS_QUICK = (
    backends.compiled_by_default(op) for op in ("kron_matmul_norm", "kron_ffn", "kron_qkv", "kron_embedding")
)
_REFUSED = (AttributeError, RuntimeError, TypeError, ValueError)


class AddNorm(NamedTuple):
    """``layer_norm(residual + y)`` of a result ``y``: its last dimension is normed, as at the end of a BERT block.

    ``residual`` has the shape of ``y``; ``weight`` and ``bias`` are ``(m,)``, all of the dtype of ``y``.
    """

    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float = 1e-12

    def apply(self, y: Tensor) -> Tensor:
        """By plain torch, differentiably."""
        return F.layer_norm(self.residual + y, self.weight.shape, self.weight, self.bias, self.eps)


def pack_factors(a: Tensor, b: Tensor) -> Tensor:
    """Bring ``a (S, m1, n1)`` and ``b (S, m2, n2)`` into the layout of the CPU kernels, once for many calls.

    Returns bytes that mean something to this build, on a processor of this kind, as long as ``a`` and ``b`` keep their
    values: pass them as ``packed`` along with the same factors. The modules of ``kron_kernels.nn`` do this by
    themselves, and notice when a parameter changes. Empty where no compiled kernels are.
    """
    a, b = stacks(a, b)
    return kron_pack(a.detach(), b.detach())


def kron_matmul_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    norm: AddNorm,
    *,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``layer_norm(residual + kron_matmul(x, a, b, bias))``: an output projection with the end of its block.

    Operands as for ``kron_matmul`` and :class:`AddNorm`; returns ``(..., m1 * m2)``. Raises what ``kron_matmul``
    raises, and ValueError or TypeError for a residual, weight or bias that does not fit.
    """
    try:
        if _NORM_IS_QUICK and backend is None and x.is_cpu and not is_observed(x, a, b, bias, *norm[:3]):
            return matmul_norm_op(x, *stacks(a, b), bias, *norm, packed)
    except _REFUSED:
        pass
    if backends.is_unforced(backend):
        return backends.forced(kron_matmul_norm, x, a, b, bias, norm, packed=packed, backend=backend)
    check_types(x, a, b, bias)
    check_norm_types(norm)
    if _observed(x, backend, (x, a, b, bias, *norm[:3])):
        return _norm(norm, x, kron_matmul(x, a, b, bias, packed=packed, backend=backend))
    a, b = stacks(a, b)
    check_projections(x, [a], [b], [bias])
    check_norm(x, a.shape[1] * b.shape[1], norm)
    return matmul_norm_op(x, a, b, bias, *norm, packed)


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
    packed: tuple[Tensor | None, Tensor | None] = (None, None),
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
        packed: what ``pack_factors`` gave for each pair, or None.
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
        if _FFN_IS_QUICK and backend is None and x.is_cpu and not is_observed(*everything):
            pairs = (*stacks(a1, b1), bias1, *stacks(a2, b2), bias2)
            return ffn_op(x, *pairs, code, *(norm or (None, None, None, 0.0)), *packed)
    except _REFUSED:
        pass
    if backends.is_unforced(backend):
        return backends.forced(kron_ffn, *tensors, activation=activation, norm=norm, packed=packed, backend=backend)
    check_types(x, a1, b1, bias1)
    check_types(x, a2, b2, bias2)
    if norm is not None:
        check_norm_types(norm)
    if _observed(x, backend, everything):
        y = _observed_ffn(tensors, activation, packed, backend)
        return y if norm is None else _norm(norm, x, y)
    (a1, b1), (a2, b2) = stacks(a1, b1), stacks(a2, b2)
    check_ffn(x, a1, b1, bias1, a2, b2, bias2)
    if norm is None:
        return ffn_op(x, a1, b1, bias1, a2, b2, bias2, code, None, None, None, 0.0, *packed)
    check_norm(x, a2.shape[1] * b2.shape[1], norm)
    return ffn_op(x, a1, b1, bias1, a2, b2, bias2, code, *norm, *packed)


def kron_qkv(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    *,
    packed: Sequence[Tensor | None] = (),
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several products of one input, ``kron_matmul(x, a[i], b[i], bias[i])`` for each i, reading ``x`` once.

    Args:
        x: ``(..., n)``.
        a, b: a pair of factors, matrices or stacks, for each projection; their shapes may differ.
        bias: one for each projection, or None for none at all.
        packed: what ``pack_factors`` gave for each pair, or nothing.
        backend: as for ``kron_matmul``.

    Returns:
        One contiguous ``(..., m_i)`` for each projection. Viewed as ``(..., heads, m_i / heads)`` and transposed it is
        what ``scaled_dot_product_attention`` takes, without a copy.
    """
    biases: list[Tensor | None] = list(bias) if bias is not None else [None] * len(a)
    if not len(a) == len(b) == len(biases) or not a:
        raise ValueError(
            f"a, b, bias: expected as many of each, at least one projection, got {len(a)}, {len(b)} and {len(biases)}"
        )
    try:
        if _QKV_IS_QUICK and backend is None and x.is_cpu and not is_observed(x, *a, *b, *biases):
            return _qkv(x, [stacks(*pair) for pair in zip(a, b, strict=True)], bias, packed)
    except _REFUSED:
        pass
    if backends.is_unforced(backend):
        return backends.forced(kron_qkv, x, a, b, bias, packed=packed, backend=backend)
    for left, right, one_bias in zip(a, b, biases, strict=True):
        check_types(x, left, right, one_bias)
    if _observed(x, backend, (x, *a, *b, *biases)):
        each = zip(a, b, biases, packed or [None] * len(a), strict=True)
        return tuple(
            kron_matmul(x, left, right, one_bias, packed=pack, backend=backend) for left, right, one_bias, pack in each
        )
    pairs = [stacks(*pair) for pair in zip(a, b, strict=True)]
    check_projections(x, [left for left, _ in pairs], [right for _, right in pairs], biases)
    return _qkv(x, pairs, bias, packed)


def _qkv(
    x: Tensor, pairs: list[tuple[Tensor, Tensor]], bias: Sequence[Tensor] | None, packed: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    packs = [pack for pack in packed if pack is not None]
    return tuple(
        qkv_op(
            x,
            [left for left, _ in pairs],
            [right for _, right in pairs],
            list(bias) if bias is not None else [],
            packs if len(packs) == len(pairs) else [],
        )
    )


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
        if _EMBEDDING_IS_QUICK and backend is None and ids.is_cpu and not is_observed(*differentiable):
            return embedding_op(ids, *stacks(a, b), *tables, norm_weight, norm_bias, eps)
    except _REFUSED:
        pass
    if backends.is_unforced(backend):
        names = ("position_ids", "position_weight", "type_ids", "type_weight")
        added = dict(zip(names, tables, strict=True))
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
        return backends.forced(kron_embedding, ids, a, b, **added, **norm, backend=backend)
    check_types(ids, a, b, None)
    a, b = stacks(a, b)
    check_embedding(ids, a, b, *tables, norm_weight, norm_bias)
    if _observed(ids, backend, differentiable, autocast=False):
        if is_differentiated_by_ops(backend, ids.device.type):
            return apply(KronEmbedding, ids, a, b, *tables, norm_weight, norm_bias, eps)
        return reference.kron_embedding(ids, a, b, *tables, norm_weight, norm_bias, eps)
    return embedding_op(ids, a, b, *tables, norm_weight, norm_bias, eps)


def _observed(x: Tensor, backend: str | None, tensors: Sequence[Tensor | None], autocast: bool = True) -> bool:
    """Whether a call needs more than the op: gradients, autocast, the reference by name."""
    device_type = x.device.type
    if backends.resolve(backend, device_type) == "reference" and (backend is not None or device_type == "cpu"):
        return True
    if autocast and autocasts(device_type):
        return True
    return needs_autograd(*tensors)


def _norm(norm: AddNorm, x: Tensor, y: Tensor) -> Tensor:
    """The norm of a product of x, checked; autocast mixes dtypes."""
    device_type = x.device.type
    mixed = autocasts(device_type)
    check_norm(x, y.shape[-1], norm, dtypes=not mixed)
    return norm.apply(y)


def _observed_ffn(
    tensors: tuple[Any, ...],
    activation: str | None,
    packed: tuple[Tensor | None, Tensor | None],
    backend: str | None,
) -> Tensor:
    x, a1, b1, bias1, a2, b2, bias2 = tensors
    device_type = x.device.type
    reference_asked = backends.resolve(backend, device_type) == "reference"
    if reference_asked or torch._C._are_functorch_transforms_active():
        # Two products, each of which composes with whatever transforms it.
        hidden = kron_matmul(x, a1, b1, bias1, activation=activation, backend=backend)
        return kron_matmul(hidden, a2, b2, bias2, backend=backend)
    if autocasts(device_type):
        x, a1, b1, bias1, a2, b2, bias2 = cast_for_autocast(device_type, *tensors)
    (a1, b1), (a2, b2) = stacks(a1, b1), stacks(a2, b2)
    check_ffn(x, a1, b1, bias1, a2, b2, bias2)
    code = activation_code(activation)
    if not needs_autograd(x, a1, b1, bias1, a2, b2, bias2):
        return ffn_op(x, a1, b1, bias1, a2, b2, bias2, code, None, None, None, 0.0, *packed)
    return apply(KronFfn, x, a1, b1, bias1, a2, b2, bias2, activation)


class KronFfn(torch.autograd.Function):
    """``kron_ffn`` around its op; backward computes the intermediate anew."""

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
        if torch.is_grad_enabled():
            # Higher orders: the gradient of two products, which is differentiable itself.
            x, a1, b1, bias1, a2, b2, bias2 = tensors
            hidden = kron_matmul(x, a1, b1, bias1, activation=ctx.activation)
            y = kron_matmul(hidden, a2, b2, bias2)
            wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return (*(next(found) if need else None for need in needs), None)
        mask = sum(need << bit for bit, need in enumerate(needs))
        x, a1, b1, bias1, a2, b2, _ = tensors
        gradients = kron_ffn_backward(grad, x, a1, b1, bias1, a2, b2, activation_code(ctx.activation), mask)
        return (*(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None)
