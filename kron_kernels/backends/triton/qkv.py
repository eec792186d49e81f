"""Several products of one input in one launch: queries, keys and values.

The programs of one block of tokens follow each other, whatever their projection: x comes from memory once, and from L2
after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...schemas.product import Product
from .launch import Options, device_of, is_exact, launch, precision, rows
from .matmul import multiply, run_product
from .tiles import TinyProduct, ceil_div, matmul_tiles, tiny_product, token_bucket

# Projections of one launch.
_MOST = 4


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
    """As ``matmul_kernel``, for COUNT projections of one shape and of the same strides; the biases may be None.

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


def kron_qkv(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[Tensor]:
    """The op ``kron_qkv``; ``packed`` is of the CPU.

    Neighbours of one shape with a tiny factor go into one launch. Other products are launched one by one: those that
    programs hold whole read x once anyway.
    """
    results = [x.new_empty(*x.shape[:-1], left.shape[1] * right.shape[1]) for left, right in zip(a, b, strict=True)]
    x = rows(x)
    if x.shape[0] == 0:
        return results
    first = 0
    while first < len(a):
        last = first + 1
        while last < min(len(a), first + _MOST) and _alike(a[first], a[last]) and _alike(b[first], b[last]):
            last += 1
        product = tiny_product(Product.of(a[first], b[first]))
        if product is None or last - first == 1:
            for i in range(first, last):
                run_product(x, a[i], b[i], results[i], bias[i] if bias else None)
        else:
            group = slice(first, last)
            _run_group(product, x, a[group], b[group], bias[group], results[group])
        first = last
    return results


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride()


def _run_group(
    product: TinyProduct, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:  # fmt: skip
    """One launch for two to four products ``x (T, n)`` of one shape and of the same strides."""
    count, tokens = len(a), x.shape[0]
    large, tiny = (a, b) if product.right else (b, a)
    shape = (product, token_bucket(tokens), x.element_size(), product.expands, False, is_exact(x))
    tiles = matmul_tiles(device_of(x).arch, *shape)
    programs = count * ceil_div(tokens, tiles.tokens) * ceil_div(product.large_out, tiles.columns)
    biases: Sequence[Tensor | None] = [each.contiguous() for each in bias] or [None]
    operands: tuple[Sequence[Tensor | None], ...] = (large, tiny, biases, results)
    pointers = (each[min(i, len(each) - 1)] for each in operands for i in range(_MOST))
    launch(
        projections_kernel,
        (programs,),
        (x, *pointers, tokens, x.stride(0), *large[0].stride(), *tiny[0].stride()),
        (count, *product, product.expands, precision(), *tiles[:3]),
        Options(*tiles[3:]),
    )
