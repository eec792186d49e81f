"""Add and norm behind a product: a pass over whole rows of its result, of which a program holds a few."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...schemas import reference
from .launch import Options, launch, rows
from .matmul import run_product
from .row_tiles import LONGEST_ROW, row_tiles
from .tiles import ceil_div, power_of_two


@triton.jit
def normalise(y, real, eps, M: tl.constexpr):
    """``y (BT, M2)``, zeros where not ``real``, with mean 0 and variance 1 over M columns; 1 / deviation."""
    mean = tl.sum(y, axis=1, keep_dims=True) / M
    centred = tl.where(real, y - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / M + eps)
    return centred * scale, scale


@triton.jit
def mean_of_rows(tiles, Q: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BT: tl.constexpr):
    """Of tiles ``(BT * R, .)`` that hold whole tokens: the mean of each token, for each of its rows."""
    total = tl.sum(tiles[0], 1)
    for index in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[index], 1)
    if R == 2:
        both = tl.sum(tl.reshape(total, [BT // 8, 2, 8]), 1)
        total = tl.reshape(tl.broadcast_to(both[:, None, :], [BT // 8, 2, 8]), [2 * BT])
    return total / (Q * N)


@triton.jit
def statistics(tiles, eps, Q: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BT: tl.constexpr):
    """Mean and one over the standard deviation of each token, for each row of tiles that hold whole tokens."""
    mean = mean_of_rows(tiles, Q, N, R, BT)
    squares = ()
    for block in tl.static_range(len(tiles)):
        centred = tiles[block] - mean[:, None]
        squares = squares + (centred * centred,)
    return mean, tl.rsqrt(mean_of_rows(squares, Q, N, R, BT) + eps)


@triton.jit
def load_vector(vector, column, real):
    """``(1, M2)`` float32 of a vector of M values, zeros beyond."""
    return tl.load(vector + column, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T"])
def add_norm_kernel(
    y, residual, weight, bias, T, residual_stride, eps, M: tl.constexpr, M2: tl.constexpr, BT: tl.constexpr
):
    """``y = layer_norm(residual + y)``, in place, for contiguous ``y (T, M)``."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.arange(0, M2)
    real = column < M
    mask = (t[:, None] < T) & real[None, :]
    place = y + t[:, None] * M + column[None, :]
    row = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    row += tl.load(residual + t[:, None] * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    row, _ = normalise(row, real[None, :], eps, M)
    row = row * load_vector(weight, column, real) + load_vector(bias, column, real)
    tl.store(place, row.to(y.dtype.element_ty), mask=mask)


def kron_matmul_norm(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    eps: float, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op ``kron_matmul_norm``; ``packed`` is of the CPU. Longer rows than a program holds are normed by torch."""
    size = a.shape[1] * b.shape[1]
    y = x.new_empty(*x.shape[:-1], size)
    run_product(x, a, b, y, bias)
    return add_norm(y, residual, norm_weight, norm_bias, eps)


def add_norm(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``layer_norm(residual + y)`` of a contiguous ``y (..., M)`` of the caller's own: in place where it can be."""
    size = y.shape[-1]
    if size > LONGEST_ROW:
        return reference.add_norm(y, residual, weight, bias, eps)
    if y.numel() > 0:
        residual, tokens, padded = rows(residual), y.numel() // size, power_of_two(size, 1)
        block, warps = row_tiles(padded)
        launch(
            add_norm_kernel,
            (ceil_div(tokens, block),),
            (y, residual, weight.contiguous(), bias.contiguous(), tokens, residual.stride(0), eps),
            (size, padded, block),
            Options(warps, 1),
        )
    return y
