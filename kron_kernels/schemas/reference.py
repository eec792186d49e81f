"""The products by their definition, in plain torch: the oracle of the tests and the fallback of every backend.

One token ``x`` of ``n1 * n2`` values is read row-major as a matrix ``X (n1, n2)``. Then

    Y (m1, m2) = sum_s A_s X B_s^T

read row-major is ``(sum_s A_s (x) B_s) x``, without the ``(m1 * m2, n1 * n2)`` weight ever being built
(Van Loan, "The ubiquitous Kronecker product", 2000). Works on any device and floating dtype, in fp64 too, and is
differentiable to any order by torch itself.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def kron_weight(a: Tensor, b: Tensor) -> Tensor:
    """Dense ``sum_s kron(a[s], b[s])``, ``(m1 * m2, n1 * n2)``, of ``a (S, m1, n1)`` and ``b (S, m2, n2)``."""
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape
    return torch.einsum("sij,skl->ikjl", a, b).reshape(m1 * m2, n1 * n2)


def order_cost(m1: int, n1: int, m2: int, n2: int, terms: int = 1) -> tuple[int, int]:
    """Multiply-adds a token of sum_s A_s X B_s^T, (B first, A first), for A_s (m1, n1), B_s (m2, n2) and X (n1, n2)."""
    return terms * n1 * m2 * (n2 + m1), terms * m1 * n2 * (n1 + m2)


def a_first(a: Tensor, b: Tensor) -> bool:
    """Whether ``(A_s X) B_s^T`` costs no more than ``A_s (X B_s^T)``, in multiply-adds."""
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape
    b_first_cost, a_first_cost = order_cost(m1, n1, m2, n2)
    return a_first_cost <= b_first_cost


def kron_matmul(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``activation(x @ kron_weight(a, b).T + bias)`` for ``x (..., n1 * n2)``; returns ``(..., m1 * m2)``.

    ``a`` is ``(S, m1, n1)``, ``b`` is ``(S, m2, n2)``, ``bias`` is ``(m1 * m2,)``, all of one dtype and device.
    """
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape
    grid = x.reshape(*x.shape[:-1], n1, n2)
    if a_first(a, b):
        y = torch.einsum("...sil,skl->...ik", torch.einsum("...jl,sij->...sil", grid, a), b)
    else:
        y = torch.einsum("...sjk,sij->...ik", torch.einsum("...jl,skl->...sjk", grid, b), a)
    y = y.reshape(*x.shape[:-1], m1 * m2)
    if bias is not None:
        y = y + bias
    return y if activation is None else ACTIVATIONS[activation](y)


def kron_addmm(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """``base + alpha * kron_matmul(x, a, b)`` for ``base (..., m1 * m2)``."""
    return torch.add(base, kron_matmul(x, a, b), alpha=alpha)


def kron_matmul_backward(grad: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients ``(dx, da, db, dbias)`` of ``kron_matmul`` without activation, given ``grad (..., m1 * m2)``.

    With G and X the token's gradient and input as matrices: dX = sum_s A_s^T G B_s, dA_s = sum_t G B_s X^T and
    dB_s = sum_t G^T A_s X. The results have the shapes of ``x``, ``a``, ``b`` and ``(m1 * m2,)``.
    """
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape
    grad, tokens = grad.reshape(-1, m1, m2), x.reshape(-1, n1, n2)
    half = torch.einsum("tik,sij->tsjk", grad, a)  # A_s^T G
    dx = torch.einsum("tsjk,skl->tjl", half, b).reshape(x.shape)
    db = torch.einsum("tsjk,tjl->skl", half, tokens)
    da = torch.einsum("tik,tsjk->sij", grad, torch.einsum("tjl,skl->tsjk", tokens, b))
    return dx, da, db, grad.sum(0).reshape(m1 * m2)


def add_norm(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """``layer_norm(residual + y)`` over the last dimension: the end of a transformer block."""
    return F.layer_norm(residual + y, weight.shape, weight, bias, eps)


def kron_matmul_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """``layer_norm(residual + kron_matmul(x, a, b, bias))`` over the last dimension: the end of a transformer block."""
    return add_norm(kron_matmul(x, a, b, bias), residual, norm_weight, norm_bias, eps)


def kron_ffn(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Two products with the activation between them: a feed-forward block."""
    return kron_matmul(kron_matmul(x, a1, b1, bias1, activation), a2, b2, bias2)


def kron_ffn_backward(
    grad: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    activation: str | None,
) -> tuple[Tensor, ...]:
    """Gradients ``(dx, da1, db1, dbias1, da2, db2, dbias2)`` of ``kron_ffn``; the block's middle is recomputed."""
    hidden = kron_matmul(x, a1, b1, bias1).detach().requires_grad_()
    with torch.enable_grad():
        active = hidden.clone() if activation is None else ACTIVATIONS[activation](hidden)
    grad_active, da2, db2, dbias2 = kron_matmul_backward(grad, active.detach(), a2, b2)
    (grad_hidden,) = torch.autograd.grad(active, hidden, grad_active.reshape(active.shape))
    return (*kron_matmul_backward(grad_hidden, x, a1, b1), da2, db2, dbias2)


def take_rows(table: Tensor, index: Tensor, name: str) -> Tensor:
    """``table[index]`` (..., k) of a ``table (rows, k)``; IndexError where ``index`` leaves ``[0, rows)``."""
    try:
        return F.embedding(index, table)
    except IndexError as error:
        raise index_error(name, index, table.shape[0]) or error from None


def index_error(name: str, index: Tensor, rows: int) -> IndexError | None:
    """What to raise for indices outside ``[0, rows)``, naming the first; None where there is none."""
    outside = index[(index < 0) | (index >= rows)]
    return IndexError(f"{name}: expected indices in [0, {rows}), got {int(outside[0])}") if outside.numel() else None


def kron_embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    type_ids: Tensor | None = None,
    type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Rows ``sum_s A_s[id] (x) B_s`` (..., p * k) of ``a (S, V, p)``, ``b (S, 1, k)`` for ``ids (...)``.

    Added to them, where given, are rows of a position and of a type table, whose ids broadcast to ``ids``; then a
    layer norm over the last dimension.
    """
    # (..., p, 1) * (1, k) -> (..., p * k)
    terms = [take_rows(left, ids, "ids").unsqueeze(-1) * right for left, right in zip(a, b, strict=True)]
    y = reduce(torch.add, terms).flatten(-2)
    if type_ids is not None and type_weight is not None:
        y = y + take_rows(type_weight, type_ids, "type_ids")
    if position_ids is not None and position_weight is not None:
        y = y + take_rows(position_weight, position_ids, "position_ids")
    return y if norm_weight is None else F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)


def kron_embedding_backward(
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
) -> tuple[Tensor, ...]:
    """Gradients of ``kron_embedding``, given ``grad (..., p * k)``: of a, b, the two tables and the norm's two vectors.

    The row before the norm is recomputed. The gradient of an absent operand has shape (0,).
    """
    tables = (position_ids, position_weight, type_ids, type_weight)
    rows = None if norm_weight is None else kron_embedding(ids, a, b, *tables)
    grad, *others = added_rows_backward(grad, rows, *tables, norm_weight, eps)
    grid = grad.unflatten(-1, (a.shape[2], b.shape[2]))
    terms = zip(a, b.squeeze(1), strict=True)
    grad_a, grad_b = zip(
        *(
            (
                sum_into_rows(torch.einsum("...ik,k->...i", grid, right), ids, left.shape[0]),
                torch.einsum("...ik,...i->k", grid, take_rows(left, ids, "ids")),
            )
            for left, right in terms
        ),
        strict=True,
    )
    return torch.stack(grad_a), torch.stack(grad_b).unsqueeze(1), *others


def added_rows_backward(
    grad: Tensor,
    rows: Tensor | None,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The part of ``kron_embedding_backward`` outside the product; ``rows`` are those that the norm takes.

    Returns the gradient of the product, then of the two tables and the norm's two vectors.
    """
    nothing, size = grad.new_empty(0), grad.shape[-1:]
    grad_weight = grad_bias = nothing
    if rows is not None and norm_weight is not None:
        _, mean, scale = torch.native_layer_norm(rows, size, norm_weight, None, eps)
        grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, rows, size, mean, scale, norm_weight, norm_weight, [True, True, True]
        )
    grad_tables = (
        nothing
        if index is None or table is None
        else sum_into_rows(grad.sum_to_size(*index.shape, *size), index, table.shape[0])
        for index, table in ((position_ids, position_weight), (type_ids, type_weight))
    )
    return grad, *grad_tables, grad_weight, grad_bias


def sum_into_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """The gradient of ``take_rows(table, index)`` of a table of ``count`` rows, given that of its result, ``rows``."""
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)
