"""Several products of one input in one launch: queries, keys and values.

The programs of one block of tokens follow each other, whatever their projection: x comes from memory once, and from L2
after that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mm import multiply


@triton.jit
def pick(index, first, second, third, fourth):
    """The pointer at an index."""
    picked = first
    if index == 1:
        picked = second
    if index == 2:
        picked = third
    if index == 3:
        picked = fourth
    return picked


@triton.jit(do_not_specialize=["T"])
def projections_kernel(
    x, large0, large1, large2, large3, tiny0, tiny1, tiny2, tiny3, bias0, bias1, bias2, bias3, y0, y1, y2, y3,
    T, x_stride, large_term, large_row, large_col, tiny_term, tiny_row, tiny_col, COUNT: tl.constexpr,
    S: tl.constexpr, CO: tl.constexpr, CI: tl.constexpr, LO: tl.constexpr, LI: tl.constexpr,
    RIGHT: tl.constexpr, EXPAND: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As ``mm_kernel``, for COUNT projections of one shape and of the same strides; the biases may be None.

    Pointers beyond COUNT are there for their type.
    """
    blocks: tl.constexpr = (LO + BN - 1) // BN
    program = tl.program_id(0)
    index = program // blocks % COUNT
    bias = bias0
    if bias0 is not None:
        bias = pick(index, bias0, bias1, bias2, bias3)
    multiply(
        program // (blocks * COUNT) * blocks + program % blocks, x,
        pick(index, large0, large1, large2, large3), pick(index, tiny0, tiny1, tiny2, tiny3), bias, None,
        pick(index, y0, y1, y2, y3), None, None, None,
        T, x_stride, 0, large_term, large_row, large_col, tiny_term, tiny_row, tiny_col,
        S, CO, CI, LO, LI, RIGHT, EXPAND, 0, PRECISION, BT, BN, BK,
    )  # fmt: skip
