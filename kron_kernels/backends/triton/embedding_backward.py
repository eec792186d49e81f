"""Launcher of the embedding's gradient (``kernels/embedding_backward.py``), and its sums by index.

What is summed by index, into rows of A and of the tables, goes through torch's own kernel: it sorts the indices and
adds in that order, in parts, so it is deterministic and no index that comes often holds up the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...schemas.embedding import EMBEDDING_GRADIENTS
from ...schemas.product import Product
from ...schemas.registry import needed
from .embedding import inputs, row_of, table_rows
from .kernels.embedding_backward import embedding_backward_kernel
from .launch import Options, device_of, launch
from .operands import rows
from .plan import ceil_div
from .row_plan import FEW_ROWS, embedding_gradient_tiles
from .sums import sum_partials


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
    needs: int,
) -> tuple[Tensor, ...]:
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
