"""Rows of a factored embedding: gather, expand by the row vectors, position and type rows, layer norm, in one pass.

A program holds whole rows of ``P * K`` values, a few tokens at a time. Each row is padded to ``(P2, K2)``, powers of
two, so that the expansion is an outer product in registers; column ``(i, l)`` lies at ``i * K + l`` in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...schemas.product import Product
from .launch import Options, launch
from .norm import load_vector, normalise
from .row_tiles import embedding_row, row_tiles
from .tiles import ceil_div, power_of_two


@triton.jit
def load_indices(ids, t, T, inner, outer_stride, inner_stride, rows):
    """Indices ``(BT,)`` of tokens t into a table, and whether each lies in it; one that does not comes as 0.

    Token t is element ``(t // inner, t % inner)`` of indices of the given strides, of which 0 is a broadcast; inner
    None: they lie at one stride.
    """
    if inner is None:
        at = t.to(tl.int64) * inner_stride
    else:
        at = (t // inner).to(tl.int64) * outer_stride + (t % inner).to(tl.int64) * inner_stride
    index = tl.load(ids + at, mask=t < T, other=0).to(tl.int64)
    known = (index >= 0) & (index < rows)
    return tl.where(known, index, 0), known


@triton.jit
def row_columns(P: tl.constexpr, K: tl.constexpr, P2: tl.constexpr, K2: tl.constexpr):
    """Where the padded columns ``(P2 * K2,)`` of a row lie in memory, and which of them are real."""
    column = tl.arange(0, P2 * K2)
    if K == K2:
        return column, column < P * K
    else:
        i, k = column // K2, column % K2
        return i * K + k, (i < P) & (k < K)


@triton.jit
def load_left(a, row, use, s, stride_term, stride_row, stride_col, P: tl.constexpr, P2: tl.constexpr):
    """Rows ``row (BT,)`` of ``A_s``: ``(BT, P2)`` float32, zeros beyond P and where not ``use``."""
    i = tl.arange(0, P2)
    at = row[:, None] * stride_row + i[None, :].to(tl.int64) * stride_col
    left = tl.load(a + s * stride_term + at, mask=use[:, None] & (i[None, :] < P), other=0.0)
    return left.to(tl.float32)


@triton.jit
def load_right(b, s, stride_term, stride_col, K: tl.constexpr, K2: tl.constexpr):
    """The row vector ``B_s``: ``(K2,)`` float32, zeros beyond K."""
    k = tl.arange(0, K2)
    return tl.load(b + s * stride_term + k * stride_col, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def add_table_rows(y, table, index, stride_row, column, mask):
    """``y (BT, P2 * K2)`` plus the rows of a table that the indices ``(BT,)`` choose."""
    return y + tl.load(table + index[:, None] * stride_row + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "V", "position_rows", "type_rows"])
def embedding_kernel(
    ids, ids_inner, ids_outer_stride, ids_inner_stride,
    position_ids, position_inner, position_outer_stride, position_inner_stride,
    type_ids, type_inner, type_outer_stride, type_inner_stride,
    a, a_stride_term, a_stride_row, a_stride_col, b, b_stride_term, b_stride_col,
    position_weight, position_stride, type_weight, type_stride, norm_weight, norm_bias, y_out,
    T, V, position_rows, type_rows, eps,
    TERMS: tl.constexpr, P: tl.constexpr, K: tl.constexpr, P2: tl.constexpr, K2: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``y_out (T, P * K)`` contiguous; tables and norm are None where there are none."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    column, real = row_columns(P, K, P2, K2)
    mask = (t[:, None] < T) & real[None, :]
    row, known = load_indices(ids, t, T, ids_inner, ids_outer_stride, ids_inner_stride, V)
    y = tl.zeros([BT, P2, K2], tl.float32)
    for s in range(TERMS):
        left = load_left(a, row, t < T, s, a_stride_term, a_stride_row, a_stride_col, P, P2)
        right = load_right(b, s, b_stride_term, b_stride_col, K, K2)
        y += left[:, :, None] * right[None, None, :]
    y = tl.reshape(y, [BT, P2 * K2])
    if type_weight is not None:
        index, found = load_indices(type_ids, t, T, type_inner, type_outer_stride, type_inner_stride, type_rows)
        y = add_table_rows(y, type_weight, index, type_stride, column, mask)
        known = known & found
    if position_weight is not None:
        index, found = load_indices(
            position_ids, t, T, position_inner, position_outer_stride, position_inner_stride, position_rows
        )
        y = add_table_rows(y, position_weight, index, position_stride, column, mask)
        known = known & found
    if norm_weight is not None:
        y, _ = normalise(y, real[None, :], eps, P * K)
        y = y * load_vector(norm_weight, column, real) + load_vector(norm_bias, column, real)
    # An index outside its table cannot raise here without waiting for the device; it must not go unseen either.
    y = tl.where(known[:, None], y, float("nan"))
    tl.store(y_out + t.to(tl.int64)[:, None] * (P * K) + column[None, :], y.to(y_out.dtype.element_ty), mask=mask)


class Indices(NamedTuple):
    """Indices as the kernels read them: token t's is element (t // inner, t % inner) of these strides.

    inner None: they lie at one stride.
    """

    ids: Tensor | None
    inner: int | None
    outer_stride: int
    inner_stride: int


def indices(ids: Tensor | None, shape: Sequence[int]) -> Indices:
    """Indices broadcast to ``shape``, in place where two strides can tell: rows of one table for all, say."""
    if ids is None:
        return Indices(None, None, 0, 0)
    dimensions: list[tuple[int, int]] = []
    ids = ids.expand(shape)
    for size, stride in zip(shape, ids.stride(), strict=True):
        if size == 1:
            continue
        if dimensions and dimensions[-1][1] == size * stride:
            dimensions[-1] = (dimensions[-1][0] * size, stride)
        else:
            dimensions.append((size, stride))
    if len(dimensions) > 2:
        return Indices(ids.contiguous(), None, 0, 1)
    if len(dimensions) < 2:
        return Indices(ids, None, 0, dimensions[0][1] if dimensions else 0)
    (_, outer_stride), (inner, inner_stride) = dimensions
    return Indices(ids, inner, outer_stride, inner_stride)


class Row(NamedTuple):
    """The constants of a row of ``p * k`` values: padded to powers of two, ``tokens`` of them a program."""

    terms: int
    p: int
    k: int
    p2: int
    k2: int
    tokens: int


def row_of(product: Product, tokens: int) -> Row:
    p, k = product.n1, product.n2
    return Row(product.terms, p, k, power_of_two(p, 1), power_of_two(k, 1), tokens)


def kron_embedding(
    ids: Tensor, a: Tensor, b: Tensor, position_ids: Tensor | None, position_weight: Tensor | None,
    type_ids: Tensor | None, type_weight: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """The op ``kron_embedding``; a token with an index outside its table gets NaN."""
    product = Product.of(a, b)
    tokens, warps = row_tiles(embedding_row(product))
    row = row_of(product, tokens)
    y = a.new_empty(*ids.shape, row.p * row.k)
    if ids.numel() == 0:
        return y
    arguments = inputs(ids, a, b, position_ids, position_weight, type_ids, type_weight)
    vectors = (None if vector is None else vector.contiguous() for vector in (norm_weight, norm_bias))
    launch(
        embedding_kernel,
        (ceil_div(ids.numel(), tokens),),
        (*arguments, *vectors, y, ids.numel(), *table_rows(a, position_weight, type_weight), eps),
        row,
        Options(warps, 1),
    )
    return y


def inputs(
    ids: Tensor, a: Tensor, b: Tensor, position_ids: Tensor | None, position_weight: Tensor | None,
    type_ids: Tensor | None, type_weight: Tensor | None,
) -> tuple[Tensor | int | None, ...]:  # fmt: skip
    """The first parameters of both kernels: indices, factors, and the tables with their strides."""
    tables: list[Tensor | int | None] = []
    for table in (position_weight, type_weight):
        if table is not None and table.stride(1) != 1:
            table = table.contiguous()
        tables += (table, 0 if table is None else table.stride(0))
    every = (indices(index, ids.shape) for index in (ids, position_ids, type_ids))
    return (*(part for each in every for part in each), a, *a.stride(), b, b.stride(0), b.stride(2), *tables)


def table_rows(a: Tensor, *tables: Tensor | None) -> tuple[int, ...]:
    """How many rows the tables have, that of A the first."""
    return a.shape[1], *(0 if table is None else table.shape[0] for table in tables)
