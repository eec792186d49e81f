"""Launcher of the embedding (``kernels/embedding.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...schemas.product import Product
from .kernels.embedding import embedding_kernel
from .launch import Options, launch
from .plan import ceil_div, power_of_two
from .row_plan import embedding_row, row_tiles


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
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
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
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
) -> tuple[Tensor | int | None, ...]:
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
