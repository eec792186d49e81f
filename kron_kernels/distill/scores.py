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

from ..schemas.torch_internals import apply

# Elements of the block of scores that attention_kl holds, 4 MB in float32: it stays in the cache of a core.
BLOCK_ELEMENTS = 1 << 20
# Up to how many head sizes a sequence goes through the scores of its layer. Multiply-adds of a head, backward included,
# are 4 length² head_size that way and 10 length head_size² through Gram matrices: the same at 2.5. The products of Gram
# matrices are smaller and run at a lower rate: measured, they took longer up to 3.3 (head size 64) and 4 (32).
DIRECT_HEAD_SIZES = 3
_ROWS = torch.contiguous_format


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
    squared norm of that is three inner products of Gram matrices ``(head_size, head_size)``, as small as the result
    when student and teacher are near each other: the norms of the scores do not cancel, only what one difference
    undoes of the other may. No ``(length, length)`` matrix is made.
    Sequences of at most three head sizes are quicker through the scores of the one layer, which are kept for backward.

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
        batch, length, hidden = query.shape
        head_size = hidden // heads
        ctx.heads, ctx.padding = heads, padding
        ctx.direct = length <= DIRECT_HEAD_SIZES * head_size
        q, k, q_t, k_t = _cleared(query, key, query_t, key_t, padding=padding)
        kept: tuple[Tensor, ...]
        if ctx.direct:
            q, k, q_t, k_t = (_by_heads(each, heads) for each in (q, k, q_t, k_t))
            difference = q.new_empty(batch, heads, length, length)
            _product(q, k.mT, difference)
            _product(q_t, k_t.mT, difference, beta=1, alpha=-1)
            total = torch.linalg.vector_norm(difference, dim=(2, 3)).square().sum(dtype=torch.float64)
            kept = (difference,)
        else:
            dq, q_t, k, dk = (_by_heads(each, heads) for each in (q - q_t, q_t, k, k - k_t))
            dq_dq, dq_qt, qt_qt, k_k, k_dk, dk_dk = grams = q.new_empty(6, batch, heads, head_size, head_size)
            lefts, rights = (dq, dq, q_t, k, k, dk), (dq, q_t, q_t, k, dk, dk)
            for left, right, gram in zip(lefts, rights, grams, strict=True):
                _product(left.mT, right, gram)
            total = _inner(dq_dq, k_k) + 2 * _inner(dq_qt, k_dk) + _inner(qt_qt, dk_dk)
            # K^T K, dK^T K, dQ^T Q, Q'^T Q
            kept = (k_k.clone(), k_dk.mT.clone(), dq_dq + dq_qt, dq_qt.mT + qt_qt)
        ctx.save_for_backward(query, key, query_t, key_t, *kept)
        return (total / head_size).to(_dtype(query))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_t, key_t, *kept = ctx.saved_tensors
        heads = ctx.heads
        factor = grad * 2 / (query.shape[2] // heads)
        q, k, q_t, k_t = _cleared(query, key, query_t, key_t, padding=ctx.padding)
        grad_q, grad_k = torch.empty_like(q, memory_format=_ROWS), torch.empty_like(k, memory_format=_ROWS)
        to_q, to_k = _by_heads(grad_q, heads), _by_heads(grad_k, heads)
        if ctx.direct:
            (difference,) = kept
            _product(difference, _by_heads(k, heads), to_q)
            _product(difference.mT, _by_heads(q, heads), to_k)
            grad_q.mul_(factor)
            grad_k.mul_(factor)
        else:
            k_k, dk_k, dq_q, qt_q = (each * factor for each in kept)
            dq, q_t, k, dk = (_by_heads(each, heads) for each in (q - q_t, q_t, k, k - k_t))
            _product(dq, k_k, to_q)
            _product(q_t, dk_k, to_q, beta=1)
            _product(k, dq_q, to_k)
            _product(dk, qt_q, to_k, beta=1)
        return grad_q.to(query.dtype), grad_k.to(key.dtype), None, None, None, None


class _AttentionKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, query_t: Tensor, key_t: Tensor, padding: Tensor | None, heads: int
    ) -> Tensor:
        ctx.heads, ctx.padding = heads, padding
        ctx.save_for_backward(query, key, query_t, key_t)
        total = torch.zeros((), dtype=torch.float64, device=query.device)
        operands = [_by_heads(each, heads) for each in _cleared(query, key, query_t, key_t, padding=padding)]
        with torch.autocast(query.device.type, enabled=False):
            for _, _, log_s, log_t in _probabilities(operands, padding):
                total += _inner(log_t.exp(), log_t - log_s)
        return total.to(_dtype(query))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, query_t, key_t = ctx.saved_tensors
        heads = ctx.heads
        cleared = _cleared(query, key, query_t, key_t, padding=ctx.padding)
        q, k, _, _ = operands = [_by_heads(each, heads) for each in cleared]
        grad_q, grad_k = (
            torch.empty_like(cleared[0], memory_format=_ROWS),
            torch.zeros_like(cleared[1], memory_format=_ROWS),
        )
        to_q, to_k = _by_heads(grad_q, heads), _by_heads(grad_k, heads)
        with torch.autocast(query.device.type, enabled=False):
            for some, rows, log_s, log_t in _probabilities(operands, ctx.padding):
                grad_scores = log_s.exp_().sub_(log_t.exp_())
                to_q[some, :, rows] = grad_scores @ k[some]
                to_k[some] += grad_scores.mT @ q[some, :, rows]
        factor = grad * q.shape[3] ** -0.5
        return grad_q.mul_(factor).to(query.dtype), grad_k.mul_(factor).to(key.dtype), None, None, None, None


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


def _cleared(*projected: Tensor, padding: Tensor | None) -> list[Tensor]:
    """The operands in the dtype to compute in, zero at padding; the very same tensors where that changes nothing."""
    cleared = [each.to(_dtype(projected[0])) for each in projected]
    return cleared if padding is None else [each.masked_fill(padding.unsqueeze(2), 0) for each in cleared]


def _by_heads(projected: Tensor, heads: int) -> Tensor:
    """A view ``(batch, heads, length, head_size)``."""
    return projected.unflatten(2, (heads, projected.shape[2] // heads)).transpose(1, 2)


def _product(left: Tensor, right: Tensor, out: Tensor, beta: int = 0, alpha: int = 1) -> None:
    """``out = beta out + alpha left @ right`` for each sequence and head; all may be views of :func:`_by_heads`.

    One sequence at a time: a batched product reads its heads where they are, while one over both dimensions
    would copy them together first, which takes as long as the products. Autocast leaves what is in place alone.
    """
    for one_left, one_right, one_out in zip(left, right, out, strict=True):
        one_out.baddbmm_(one_left, one_right, beta=beta, alpha=alpha)


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
