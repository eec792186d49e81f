"""The product of two middling factors: two chained products of tiles that a program holds whole.

All of a token's grids are padded to powers of two, which the names in capitals with a P are. A tile of grids
``(BT, R, C)`` is one operand of BT * R rows; to multiply the other side it is transposed within each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas.product import Product
from .launch import Options, device_of, launch, precision
from .primitives import finish
from .sums import sum_partials
from .tiles import ceil_div, chain_gradient_tiles, chain_tiles, left_first, padded, token_bucket


@triton.jit
def load_grids(
    x, t, row_stride, T, R: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr
):
    """Rows t of ``x (T, R * C)`` as ``(BT * RP, CP)``."""
    row = tl.arange(0, BT * RP)
    r = row % RP
    c = tl.arange(0, CP)
    token = t + row // RP
    mask = ((token < T) & (r < R))[:, None] & (c < C)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * row_stride + (r * C)[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_factor(f, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr):
    """A factor, padded with zeros, ``(RP, CP)``."""
    r = tl.arange(0, RP)
    c = tl.arange(0, CP)
    mask = (r < ROWS)[:, None] & (c < COLS)[None, :]
    return tl.load(
        f + r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_col, mask=mask, other=0.0
    )


@triton.jit
def swap(x, BT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """``(BT * R, C)`` to ``(BT * C, R)``: each token's grid transposed."""
    return tl.reshape(tl.permute(tl.reshape(x, [BT, R, C]), [0, 2, 1]), [BT * C, R])


@triton.jit
def times_left(x, a, BT: tl.constexpr, JP: tl.constexpr, QP: tl.constexpr, IP: tl.constexpr, PRECISION: tl.constexpr):
    """``a (IP, JP)`` times each grid of ``x (BT * JP, QP)``: ``(BT * IP, QP)`` float32."""
    y = tl.dot(swap(x, BT, JP, QP), tl.trans(a), input_precision=PRECISION)
    return swap(y, BT, QP, IP)


@triton.jit
def store_grids(
    value, bias, base, y, alpha, t, T,
    R: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """``(BT * RP, CP)`` float32 into rows t of the contiguous ``y (T, R * C)``."""
    row = tl.arange(0, BT * RP)
    r = row % RP
    c = tl.arange(0, CP)
    token = t + row // RP
    mask = ((token < T) & (r < R))[:, None] & (c < C)[None, :]
    columns = (r * C)[:, None] + c[None, :]
    finish(value, bias, base, y, token.to(tl.int64)[:, None] * (R * C), columns, alpha, mask, ACT)


@triton.jit(do_not_specialize=["T"])
def chain_kernel(
    x, a, b, bias, base, y, alpha, T, x_stride, a_term, a_row, a_col, b_term, b_row, b_col,
    S: tl.constexpr, M1: tl.constexpr, N1: tl.constexpr, M2: tl.constexpr, N2: tl.constexpr, LEFT_FIRST: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, M1P: tl.constexpr, N1P: tl.constexpr, M2P: tl.constexpr, N2P: tl.constexpr,
):  # fmt: skip
    """``y (T, M1 * M2)`` of ``x (T, N1 * N2)``, ``a (S, M1, N1)``, ``b (S, M2, N2)``."""
    t = tl.program_id(0).to(tl.int64) * BT
    grids = load_grids(x, t, x_stride, T, N1, N2, BT, N1P, N2P)
    result = tl.zeros([BT * M1P, M2P], dtype=tl.float32)
    for s in range(S):
        left = load_factor(a + s * a_term, a_row, a_col, M1, N1, M1P, N1P)
        right = load_factor(b + s * b_term, b_row, b_col, M2, N2, M2P, N2P)
        if LEFT_FIRST:
            half = times_left(grids, left, BT, N1P, N2P, M1P, PRECISION).to(left.dtype)
            result = tl.dot(half, tl.trans(right), result, input_precision=PRECISION)
        else:
            half = tl.dot(grids, tl.trans(right), input_precision=PRECISION).to(left.dtype)
            result += times_left(half, left, BT, N1P, M2P, M1P, PRECISION)
    store_grids(result, bias, base, y, alpha, t, T, M1, M2, ACT, BT, M1P, M2P)


@triton.jit(do_not_specialize=["T", "blocks_each"])
def chain_gradient_kernel(
    grad, x, a, b, partial_a, partial_b, T, blocks_each, grad_stride, x_stride,
    a_term, a_row, a_col, b_term, b_row, b_col,
    S: tl.constexpr, M1: tl.constexpr, N1: tl.constexpr, M2: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, M1P: tl.constexpr, N1P: tl.constexpr, M2P: tl.constexpr, N2P: tl.constexpr,
):  # fmt: skip
    """``partial_a (programs, S, M1, N1)``, ``partial_b (programs, S, M2, N2)``: both gradients over a program's tokens.

    With U = X B^T and W = A^T G of a token, dA = sum G U^T and dB = sum W^T X. Either of the partials may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    left = load_factor(a + s * a_term, a_row, a_col, M1, N1, M1P, N1P)
    right = load_factor(b + s * b_term, b_row, b_col, M2, N2, M2P, N2P)
    da = tl.zeros([M1P, N1P], dtype=tl.float32)
    db = tl.zeros([M2P, N2P], dtype=tl.float32)
    first = program * blocks_each * BT
    for block in range(blocks_each):
        t = first + block * BT
        g = load_grids(grad, t, grad_stride, T, M1, M2, BT, M1P, M2P)
        grids = load_grids(x, t, x_stride, T, N1, N2, BT, N1P, N2P)
        if partial_a is not None:
            u = tl.dot(grids, tl.trans(right), input_precision=PRECISION).to(left.dtype)
            u = swap(u, BT, N1P, M2P)
            da = tl.dot(tl.trans(swap(g, BT, M1P, M2P)), u, da, input_precision=PRECISION)
        if partial_b is not None:
            w = times_left(g, tl.trans(left), BT, M1P, M2P, N1P, PRECISION).to(left.dtype)
            db = tl.dot(tl.trans(w), grids, db, input_precision=PRECISION)
    # The partial sums lie as (programs, S, ...).
    at = program * S + s
    if partial_a is not None:
        i = tl.arange(0, M1P)[:, None]
        j = tl.arange(0, N1P)[None, :]
        tl.store(partial_a + at * (M1 * N1) + i * N1 + j, da, mask=(i < M1) & (j < N1))
    if partial_b is not None:
        p = tl.arange(0, M2P)[:, None]
        q = tl.arange(0, N2P)[None, :]
        tl.store(partial_b + at * (M2 * N2) + p * N2 + q, db, mask=(p < M2) & (q < N2))


def forward(
    x: Tensor, a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None, activation: int = 0,
    base: Tensor | None = None, alpha: float | None = None,
) -> None:  # fmt: skip
    """``activation(alpha * product + bias + base)`` of ``x (T, n1 * n2)`` and stacked factors into the contiguous y."""
    product = Product.of(a, b)
    block, *options = chain_tiles(device_of(x).arch, product, token_bucket(x.shape[0]), x.element_size())
    launch(
        chain_kernel,
        (ceil_div(x.shape[0], block),),
        (x, a, b, bias, base, y, alpha, x.shape[0], x.stride(0), *a.stride(), *b.stride()),
        (*product, left_first(product), activation, precision(), block, *padded(product)),
        Options(*options),
    )


def backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, dx: Tensor | None, da: Tensor | None, db: Tensor | None
) -> None:
    """Gradients of the product from ``grad (T, m1 * m2)``, into those that are not None."""
    if dx is not None:
        forward(grad, a.mT, b.mT, dx)
    if da is None and db is None:
        return
    product = Product.of(a, b)
    tokens = x.shape[0]
    device = device_of(x)
    block, *options = chain_gradient_tiles(device.arch, product, token_bucket(tokens), x.element_size())
    blocks = ceil_div(tokens, block)
    each = ceil_div(blocks, max(1, 2 * device.multiprocessors // product.terms))
    programs = ceil_div(blocks, each)
    partial_a, partial_b = (
        None if out is None else x.new_empty(programs, *out.shape, dtype=torch.float32) for out in (da, db)
    )
    launch(
        chain_gradient_kernel,
        (programs, product.terms),
        (grad, x, a, b, partial_a, partial_b, tokens, each, grad.stride(0), x.stride(0), *a.stride(), *b.stride()),
        (*product, precision(), block, *padded(product)),
        Options(*options),
    )
    for partial, out in ((partial_a, da), (partial_b, db)):
        if partial is not None and out is not None:
            sum_partials(partial, out)
