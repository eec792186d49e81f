"""How far a student's attention is from its teacher's, from queries and keys, without the scores of whole layers.

Both terms take what the projections give, ``(batch, length, heads * head_size)``, and are sums over a batch: the
caller divides by what it averages over. The gradient goes to the student alone and is not differentiable again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._observers import apply

# Elements of the block of scores that attention_kl holds, 4 MB in float32: it stays in the cache of a core.
BLOCK_ELEMENTS = 1 << 20


def score_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mask: Tensor | None,
    *,
    heads: int,
) -> Tensor:
    """Squared difference of the attention scores before the softmax, ``Q K^T / sqrt(head_size)``, summed.

    The sum is over sequences, heads and pairs of a query and a key that are no padding; divide it by their number for
    the mean of KroneckerBERT's attention loss (Tahaei et al., 2021, section 3.2).

    With ``dQ = Q - Q'`` and ``dK = K - K'``, teacher primed, the scores of a head differ by ``dQ K^T + Q' dK^T``. The
    squared norm of that is three inner products of Gram matrices ``(head_size, head_size)``, none larger than the
    result when student and teacher are near each other: nothing cancels, and no ``(length, length)`` matrix is made.
    Sequences of at most three head sizes take fewer multiply-adds through the scores of the one layer, and go that way.

    Args:
        student_query, student_key: ``(batch, length, heads * head_size)``, any floating dtype.
        teacher_query, teacher_key: of the same shape; their dtype may be another. They get no gradient.
        mask: ``(batch, length)``, 0 where there is padding, or None for none. What stands at padding does not matter.
        heads: number of attention heads.

    Returns:
        A scalar, float64 if the student is, else float32: computed in that dtype, inside autocast too.

    Raises:
        ValueError: shapes that do not fit each other, ``mask`` or ``heads``.
    """
    padding = _check(student_query, student_key, teacher_query, teacher_key, mask, heads)
    return apply(_ScoreMse, student_query, student_key, teacher_query, teacher_key, padding, heads)


def attention_kl(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mask: Tensor | None,
    *,
    heads: int,
) -> Tensor:
    """Kullback-Leibler divergence of the student's attention probabilities from the teacher's, summed.

    ``sum p_t log(p_t / p_s)`` over keys, queries that are no padding, heads and sequences: the attention loss of KnGPT2
    (Edalati et al., "Kronecker Decomposition for GPT Compression", 2021). Keys that are padding have probability zero.
    A block of at most ``BLOCK_ELEMENTS`` scores (one query's, if those are more) exists at a time, and is computed
    once more in the backward pass.

    Arguments, result and errors are those of :func:`score_mse`.
    """
    padding = _check(student_query, student_key, teacher_query, teacher_key, mask, heads)
    return apply(_AttentionKl, student_query, student_key, teacher_query, teacher_key, padding, heads)


class _ScoreMse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, query_t: Tensor, key_t: Tensor, padding: Tensor | None, heads: int
    ) -> Tensor:
        length, head_size = query.shape[1], query.shape[2] // heads
        ctx.heads, ctx.padding = heads, padding
        # Multiply-adds of a head, backward included: 4 length² head_size through its scores, 12 length head_size² not.
        ctx.direct = length <= 3 * head_size
        with torch.autocast(query.device.type, enabled=False):
            kept: tuple[Tensor, ...]
            if ctx.direct:
                q, k, q_t, k_t = _split(query, key, query_t, key_t, padding=padding, heads=heads)
                difference = torch.matmul(q, k.mT).sub_(torch.matmul(q_t, k_t.mT))
                total = _inner(difference, difference)
                kept = (difference,)
            else:
                dq, q_t, k, dk = _differences(query, key, query_t, key_t, padding=padding, heads=heads)
                dq_dq, dq_qt, qt_qt = dq.mT @ dq, dq.mT @ q_t, q_t.mT @ q_t
                k_k, k_dk, dk_dk = k.mT @ k, k.mT @ dk, dk.mT @ dk
                total = _inner(dq_dq, k_k) + 2 * _inner(dq_qt, k_dk) + _inner(qt_qt, dk_dk)
                # K^T K, dK^T K, dQ^T Q, Q'^T Q
                kept = (k_k, k_dk.mT, dq_dq + dq_qt, dq_qt.mT + qt_qt)
        ctx.save_for_backward(query, key, query_t, key_t, *kept)
        return (total / head_size).to(_dtype(query))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_t, key_t, *kept = ctx.saved_tensors
        operands: dict[str, Any] = {"padding": ctx.padding, "heads": ctx.heads}
        with torch.autocast(query.device.type, enabled=False):
            if ctx.direct:
                (difference,) = kept
                q, k = _split(query, key, **operands)
                grad_q, grad_k = difference @ k, difference.mT @ q
            else:
                k_k, dk_k, dq_q, qt_q = kept
                dq, q_t, k, dk = _differences(query, key, query_t, key_t, **operands)
                grad_q = (dq @ k_k).add_(q_t @ dk_k)
                grad_k = (k @ dq_q).add_(dk @ qt_q)
            factor = grad * 2 / (query.shape[2] // ctx.heads)
            return _joined(grad_q.mul_(factor), query), _joined(grad_k.mul_(factor), key), None, None, None, None


class _AttentionKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, query_t: Tensor, key_t: Tensor, padding: Tensor | None, heads: int
    ) -> Tensor:
        ctx.heads, ctx.padding = heads, padding
        ctx.save_for_backward(query, key, query_t, key_t)
        total = torch.zeros((), dtype=torch.float64, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            operands = _split(query, key, query_t, key_t, padding=padding, heads=heads)
            for _, _, log_s, log_t in _probabilities(operands, padding):
                total += _inner(log_t.exp(), log_t - log_s)
        return total.to(_dtype(query))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_t, key_t = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            operands = _split(query, key, query_t, key_t, padding=ctx.padding, heads=ctx.heads)
            q, k = operands[:2]
            grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
            for some, rows, log_s, log_t in _probabilities(operands, ctx.padding):
                grad_scores = log_s.exp_().sub_(log_t.exp_())
                grad_q[some, :, rows] = grad_scores @ k[some]
                grad_k[some] += grad_scores.mT @ q[some, :, rows]
            factor = grad * (query.shape[2] // ctx.heads) ** -0.5
            return _joined(grad_q.mul_(factor), query), _joined(grad_k.mul_(factor), key), None, None, None, None


def _check(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mask: Tensor | None,
    heads: int,
) -> Tensor | None:
    """Where there is padding, as bool; None for nowhere."""
    shape = student_query.shape
    if len(shape) != 3:
        raise ValueError(f"student_query: expected shape (batch, length, heads * head_size), got {tuple(shape)}")
    for name, tensor in (
        ("student_key", student_key),
        ("teacher_query", teacher_query),
        ("teacher_key", teacher_key),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected the shape of student_query, {tuple(shape)}, got {tuple(tensor.shape)}")
    if heads < 1 or shape[2] % heads:
        raise ValueError(f"heads: expected a divisor of the hidden size {shape[2]}, got {heads}")
    if mask is None:
        return None
    if mask.shape != shape[:2]:
        raise ValueError(f"mask: expected shape (batch, length) = {tuple(shape[:2])}, got {tuple(mask.shape)}")
    return ~mask.bool()


def _dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype is torch.float64 else torch.float32


def _split(*projected: Tensor, padding: Tensor | None, heads: int) -> list[Tensor]:
    """Copies ``(batch, heads, length, head_size)`` in the dtype to compute in, zero at padding."""
    split = [
        each.to(_dtype(projected[0]))
        .unflatten(2, (heads, each.shape[2] // heads))
        .transpose(1, 2)
        .clone(memory_format=torch.contiguous_format)
        for each in projected
    ]
    if padding is not None:
        for each in split:
            each.masked_fill_(padding[:, None, :, None], 0)
    return split


def _differences(*projected: Tensor, padding: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Q - Q'``, ``Q'``, ``K`` and ``K - K'`` as :func:`_split` gives them."""
    q, k, q_t, k_t = _split(*projected, padding=padding, heads=heads)
    return q.sub_(q_t), q_t, k, torch.sub(k, k_t, out=k_t)


def _joined(split: Tensor, like: Tensor) -> Tensor:
    """``(batch, heads, length, head_size)`` as ``(batch, length, heads * head_size)`` in the dtype of ``like``."""
    return split.transpose(1, 2).to(like.dtype).reshape(like.shape)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two tensors read as vectors, summed in float64."""
    return (left * right).sum(dtype=torch.float64)


def _probabilities(operands: list[Tensor], padding: Tensor | None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of log-probabilities ``(sequences, heads, rows, length)``: which sequences, which rows, student, teacher.

    Queries that are padding are zero on both sides, which makes their probabilities the same.
    """
    batch, heads, length, head_size = operands[0].shape
    rows = max(1, min(length, BLOCK_ELEMENTS // max(1, heads * length)))
    sequences = max(1, BLOCK_ELEMENTS // max(1, heads * rows * length))
    for first in range(0, batch, sequences):
        some = slice(first, first + sequences)
        for start in range(0, length, rows):
            block = slice(start, start + rows)
            logs = []
            for query, key in (operands[:2], operands[2:]):
                scores = (query[some, :, block] @ key[some].mT).mul_(head_size**-0.5)
                if padding is not None:
                    # Not -inf: a difference of two of those, or a sequence that is all padding, would be NaN.
                    scores.masked_fill_(padding[some, None, None, :], torch.finfo(scores.dtype).min)
                logs.append(torch.log_softmax(scores, -1))
            yield some, block, logs[0], logs[1]
