"""Gradients of the embedding: rows recomputed, the norm's gradient, and what is summed over tokens in part.

A fixed number of programs walk over the tokens. Each keeps its sums in registers, one for each token and column of its
tile, and leaves them behind at the end; what is summed by index leaves as a row for each token. Those sums, into rows
of A and of the tables, go through torch's own kernel: it sorts the indices and adds in that order, in parts, so it is
deterministic and no index that comes often holds up the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas.embedding import EMBEDDING_GRADIENTS
from ...schemas.product import Product
from ...schemas.registry import needed
from .embedding import (
    add_table_rows,
    inputs,
    load_indices,
    load_left,
    load_right,
    row_columns,
    row_of,
    table_rows,
)
from .launch import Options, device_of, launch, rows
from .norm import load_vector, normalise
from .row_tiles import FEW_ROWS, embedding_gradient_tiles
from .sums import sum_partials
from .tiles import ceil_div


@triton.jit
def store_sum(partial, tile, column, real, M: tl.constexpr):
    """The sum over tokens of ``tile (BT, M2)`` as this program's row of ``partial (programs, M)``."""
    row = partial + tl.program_id(0).to(tl.int64) * M + column
    tl.store(row, tl.sum(tile, axis=0), mask=real)


@triton.jit(do_not_specialize=["T", "V", "position_rows", "type_rows"])
def embedding_backward_kernel(
    ids, ids_inner, ids_outer_stride, ids_inner_stride,
    position_ids, position_inner, position_outer_stride, position_inner_stride,
    type_ids, type_inner, type_outer_stride, type_inner_stride,
    a, a_stride_term, a_stride_row, a_stride_col, b, b_stride_term, b_stride_col,
    position_weight, position_stride, type_weight, type_stride, norm_weight, grad, grad_stride,
    row_grad, left_grad, row_indices, position_indices, type_indices, b_partial, type_partial, weight_partial,
    bias_partial, T, V, position_rows, type_rows, eps,
    TERMS: tl.constexpr, P: tl.constexpr, K: tl.constexpr, P2: tl.constexpr, K2: tl.constexpr, BT: tl.constexpr,
    TYPES: tl.constexpr,
):  # fmt: skip
    """Outputs, each of which may be None:

    - row_grad ``(T, P * K)``: the gradient of the row before the norm;
    - left_grad ``(T, TERMS * P)``: of the rows of A;
    - the three kinds of indices ``(T,)`` int32, 0 for those outside their table;
    - in part, one a program: ``b_partial (TERMS, K)``, ``type_partial (TYPES, P * K)``, and the norm's ``(P * K,)``.
    """
    M: tl.constexpr = P * K
    M2: tl.constexpr = P2 * K2
    column, real = row_columns(P, K, P2, K2)
    weight_sum = tl.zeros([BT, M2], tl.float32)
    bias_sum = tl.zeros([BT, M2], tl.float32)
    type_sums = ()
    for _ in tl.static_range(TYPES):
        type_sums = type_sums + (tl.zeros([BT, M2], tl.float32),)
    b_sums = ()
    for _ in tl.static_range(TERMS):
        b_sums = b_sums + (tl.zeros([BT, M2], tl.float32),)
    for t0 in range(tl.program_id(0) * BT, T, tl.num_programs(0) * BT):
        t = t0 + tl.arange(0, BT)
        mask = (t[:, None] < T) & real[None, :]
        row, use = load_indices(ids, t, T, ids_inner, ids_outer_stride, ids_inner_stride, V)
        if row_indices is not None:
            tl.store(row_indices + t, row.to(tl.int32), mask=t < T)
        if position_ids is not None:
            position, known = load_indices(
                position_ids, t, T, position_inner, position_outer_stride, position_inner_stride, position_rows
            )
            use = use & known
            if position_indices is not None:
                tl.store(position_indices + t, position.to(tl.int32), mask=t < T)
        if type_ids is not None:
            kind, known = load_indices(type_ids, t, T, type_inner, type_outer_stride, type_inner_stride, type_rows)
            use = use & known
            if type_indices is not None:
                tl.store(type_indices + t, kind.to(tl.int32), mask=t < T)
        # A token with an index outside its table, whose row is NaN, moves nothing.
        place = t.to(tl.int64)[:, None] * grad_stride + column[None, :]
        dy = tl.load(grad + place, mask=mask & use[:, None], other=0.0).to(tl.float32)
        if norm_weight is not None:
            y = tl.zeros([BT, P2, K2], tl.float32)
            for s in range(TERMS):
                left = load_left(a, row, t < T, s, a_stride_term, a_stride_row, a_stride_col, P, P2)
                right = load_right(b, s, b_stride_term, b_stride_col, K, K2)
                y += left[:, :, None] * right[None, None, :]
            y = tl.reshape(y, [BT, M2])
            if type_weight is not None:
                y = add_table_rows(y, type_weight, kind, type_stride, column, mask)
            if position_weight is not None:
                y = add_table_rows(y, position_weight, position, position_stride, column, mask)
            y, scale = normalise(y, real[None, :], eps, M)
            weight_sum += dy * y
            bias_sum += dy
            dy *= load_vector(norm_weight, column, real)
            # y has mean 0 and variance 1: what changes neither, of dy.
            along = tl.sum(dy * y, axis=1, keep_dims=True) / M
            dy = (dy - tl.sum(dy, axis=1, keep_dims=True) / M - y * along) * scale
        if row_grad is not None:
            place = t.to(tl.int64)[:, None] * M + column[None, :]
            tl.store(row_grad + place, dy.to(row_grad.dtype.element_ty), mask=mask)
        sums = ()
        for index in tl.static_range(TYPES):
            sums = sums + (type_sums[index] + tl.where((kind == index)[:, None], dy, 0.0),)
        type_sums = sums
        grid = tl.reshape(dy, [BT, P2, K2])
        sums = ()
        for s in tl.static_range(TERMS):
            if left_grad is not None:
                right = load_right(b, s, b_stride_term, b_stride_col, K, K2)
                left_dy = tl.sum(grid * right[None, None, :], axis=2)
                i = tl.arange(0, P2)
                place = left_grad + t.to(tl.int64)[:, None] * (TERMS * P) + s * P + i[None, :]
                inside = (t[:, None] < T) & (i[None, :] < P)
                tl.store(place, left_dy.to(left_grad.dtype.element_ty), mask=inside)
            if b_partial is not None:
                left = load_left(a, row, t < T, s, a_stride_term, a_stride_row, a_stride_col, P, P2)
                sums = sums + (b_sums[s] + tl.reshape(grid * left[:, :, None], [BT, M2]),)
            else:
                sums = sums + (b_sums[s],)
        b_sums = sums
    if weight_partial is not None:
        store_sum(weight_partial, weight_sum, column, real, M)
        store_sum(bias_partial, bias_sum, column, real, M)
    for index in tl.static_range(TYPES):
        store_sum(type_partial + index * M, type_sums[index], column, real, TYPES * M)
    if b_partial is not None:
        k = tl.arange(0, K2)
        for s in tl.static_range(TERMS):
            total = tl.sum(tl.reshape(tl.sum(b_sums[s], axis=0), [P2, K2]), axis=0)
            tl.store(b_partial + (tl.program_id(0).to(tl.int64) * TERMS + s) * K + k, total, mask=k < K)


def kron_embedding_backward(
    grad: Tensor, ids: Tensor, a: Tensor, b: Tensor, position_ids: Tensor | None, position_weight: Tensor | None,
    type_ids: Tensor | None, type_weight: Tensor | None, norm_weight: Tensor | None, eps: float, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op ``kron_embedding_backward``; a token with an index outside its table counts as if its grad were zero."""
    given = (a, b, position_weight, type_weight, norm_weight, norm_weight)
    asked = zip(given, needed(needs, len(EMBEDDING_GRADIENTS)), strict=True)
    shapes = [tensor.shape if need and tensor is not None else torch.Size([0]) for tensor, need in asked]
    wanted = [shape.numel() > 0 for shape in shapes]
    tokens, size = ids.numel(), a.shape[2] * b.shape[2]
    if tokens == 0 or not any(wanted):
        return tuple(a.new_zeros(shape) for shape in shapes)
    need_a, need_b, need_positions, need_types, need_weight, need_bias = wanted
    types = type_weight.shape[0] if need_types and type_weight is not None else 0
    few = types if types <= FEW_ROWS else 0
    product = Product.of(a, b)
    tiles = embedding_gradient_tiles(product, few)
    assert tiles is not None  # embedding_unsupported_reason
    row = row_of(product, tiles[0])
    programs = min(ceil_div(tokens, row.tokens), 2 * device_of(a).multiprocessors)

    def room(need: bool, *shape: int, dtype: torch.dtype) -> Tensor | None:
        return a.new_empty(shape, dtype=dtype) if need else None

    scatter_types = types > few
    row_grad = room(need_positions or scatter_types, *ids.shape, size, dtype=a.dtype)
    left_grad = room(need_a, *ids.shape, row.terms * row.p, dtype=a.dtype)
    indices = [room(need, *ids.shape, dtype=torch.int32) for need in (need_a, need_positions, scatter_types)]
    partials = [
        room(need_b, programs, row.terms, row.k, dtype=torch.float32),
        room(few > 0, programs, few, size, dtype=torch.float32),
        room(need_weight or need_bias, programs, size, dtype=torch.float32),
        room(need_weight or need_bias, programs, size, dtype=torch.float32),
    ]
    grad = rows(grad)
    operands = inputs(ids, a, b, position_ids, position_weight, type_ids, type_weight)
    weight = None if norm_weight is None else norm_weight.contiguous()
    launch(
        embedding_backward_kernel,
        (programs,),
        (
            *operands, weight, grad, grad.stride(0), row_grad, left_grad, *indices, *partials,
            tokens, *table_rows(a, position_weight, type_weight), eps,
        ),
        (*row, few),
        Options(tiles[1], 1),
    )  # fmt: skip
    gradients = [a.new_empty(shape) for shape in shapes]
    for place, partial in zip((1, 3, 4, 5), partials, strict=True):
        if partial is not None and gradients[place].numel() > 0:
            sum_partials(partial, gradients[place])
    if left_grad is not None:
        summed = _sum_by_index(left_grad, indices[0], ids, a.shape[1])
        # (V, S * p) to (S, V, p)
        gradients[0] = summed.unflatten(1, (row.terms, row.p)).transpose(0, 1).contiguous()
    if need_positions:
        gradients[2] = _sum_by_index(row_grad, indices[1], position_ids, shapes[2][0])
    if scatter_types:
        gradients[3] = _sum_by_index(row_grad, indices[2], type_ids, shapes[3][0])
    return tuple(gradients)


def _sum_by_index(values: Tensor | None, index: Tensor | None, given: Tensor | None, size: int) -> Tensor:
    """``(size, m)``: the sum of ``values (..., m)`` for each index of ``index (...)``.

    ``given`` broadcasts to ``index``: over what it repeats, values are summed first, for there is nothing to sort.
    """
    assert values is not None
    assert index is not None
    assert given is not None
    dtype, strides = values.dtype, given.expand(index.shape).stride()
    repeated = [dim for dim, stride in enumerate(strides) if stride == 0 and index.shape[dim] > 1]
    if repeated:
        values = values.sum(repeated, dtype=torch.float32)
        for dim in reversed(repeated):
            index = index.select(dim, 0)
    flat = values.reshape(-1, values.shape[-1])
    return torch.ops.aten.embedding_dense_backward(flat, index.reshape(-1), size, -1, False).to(dtype)
