"""What follows a product on whole rows of its result: add and norm. A program holds a few rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(y, real, eps, M: tl.constexpr):
    """``y (BT, M2)``, zeros where not ``real``, with mean 0 and variance 1 over M columns; 1 / deviation."""
    mean = tl.sum(y, axis=1, keep_dims=True) / M
    centred = tl.where(real, y - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / M + eps)
    return centred * scale, scale


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
