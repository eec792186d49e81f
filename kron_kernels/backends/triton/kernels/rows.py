"""What follows a product on whole rows of its result: add and norm, rounding to int8. A program holds a few rows."""

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


@triton.jit(do_not_specialize=["T"])
def quantise_kernel(y, q, scale, T, M: tl.constexpr, M2: tl.constexpr, BT: tl.constexpr):
    """Rows of the contiguous ``y (T, M)`` as bytes ``q (T, M)`` and ``scale (T,)``: reference.quantize_tokens."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.arange(0, M2)
    mask = (t[:, None] < T) & (column[None, :] < M)
    place = t[:, None] * M + column[None, :]
    row = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    # Of magnitudes the bits order as the values do, with infinity and then NaN at the top: neither is lost.
    largest = tl.max(row.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    step = tl.div_rn(largest, 127.0)
    usable = (step > 0.0) & (step < float("inf"))
    steps = tl.div_rn(row, tl.where(usable, step, 1.0)[:, None])
    # A scale below the normal numbers is itself rounded: its largest value may come out above 127.
    steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
    rounded = (steps + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(q + place, tl.where(usable[:, None], rounded, 0).to(tl.int8), mask=mask)
    tl.store(scale + t, step, mask=t < T)
