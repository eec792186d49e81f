"""The product with one large and one tiny factor: a matrix product with the tiny one applied in its load or its store.

With the tiny factor C (CO, CI) and the large one L (LO, LI), a token's row is a grid of CI values for each of LI, its
result one of CO for each of LO (``primitives.py``):

    contracting   z_g = sum_c C[g, c] x_c  while loading,   y_g = z_g L^T             CO products
    expanding     h_c = x_c L^T,           y_g = sum_c C[g, c] h_c  while storing     CI products

The expanding form can also reduce ``sum_tokens <h_c, o_v>`` against a second tensor o of the result's shape: the tiny
factor's gradient, for which neither h nor anything else of its size is stored. Products without a tiny factor are in
``balanced.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas.product import Product, stacks
from . import balanced
from .launch import Options, device_of, is_exact, launch, precision, rows
from .primitives import contract_row, finish, load_tile, load_tiles, load_tiny, zeros, zip_tiles
from .tiles import TinyProduct, ceil_div, matmul_tiles, tiny_product, token_bucket


@triton.jit
def add_products(
    accs, x, large, factor, t, x_stride, T, large_row, large_col, n0,
    G: tl.constexpr, CI: tl.constexpr, LO: tl.constexpr, LI: tl.constexpr, RIGHT: tl.constexpr, CONTRACT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the G accumulators ``(BT, BN)`` the products of one term, of contracted or plain tiles of x."""
    n = n0 + tl.arange(0, BN)
    for k0 in range(0, LI, BK):
        tiles = load_tiles(x, t, x_stride, T, k0, LI, CI, RIGHT, BT, BK)
        k = k0 + tl.arange(0, BK)
        inside = (k[:, None] < LI) & (n[None, :] < LO)
        # (BK, BN)
        weight = tl.load(
            large + n.to(tl.int64)[None, :] * large_row + k.to(tl.int64)[:, None] * large_col, mask=inside, other=0.0
        )
        added = ()
        for g in tl.static_range(G):
            tile = contract_row(tiles, factor, g, CI).to(weight.dtype) if CONTRACT else tiles[g]
            added = added + (tl.dot(tile, weight, accs[g], input_precision=PRECISION),)
        accs = added
    return accs


@triton.jit
def store_sums(tiles, o, sums, COUNT: tl.constexpr, STEP: tl.constexpr):
    """``sum(tiles[i] * o)`` to ``sums[i * STEP]``."""
    for i in tl.static_range(COUNT):
        tl.store(sums + i * STEP, tl.sum(tiles[i] * o.to(tl.float32)))


@triton.jit
def store_tiles(
    tiles, bias, base, y, alpha, t, T, n0,
    CO: tl.constexpr, LO: tl.constexpr, RIGHT: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The CO tiles ``(BT, BN)`` as columns n0 ... of the contiguous ``(T, CO * LO)``."""
    row_base = t.to(tl.int64)[:, None] * (CO * LO)
    inside = t[:, None] < T
    if RIGHT and CO & (CO - 1) == 0:
        columns = n0 * CO + tl.arange(0, BN * CO)[None, :]
        mask = inside & (columns < CO * LO)
        finish(zip_tiles(tiles, BT, BN, CO), bias, base, y, row_base, columns, alpha, mask, ACT)
    else:
        n = n0 + tl.arange(0, BN)[None, :]
        for g in tl.static_range(CO):
            columns = n * CO + g if RIGHT else g * LO + n
            finish(tiles[g], bias, base, y, row_base, columns, alpha, inside & (n < LO), ACT)


@triton.jit
def multiply(
    program, x, large, tiny, bias, base, y, other, partial, alpha,
    T, x_stride, other_stride, large_term, large_row, large_col, tiny_term, tiny_row, tiny_col,
    S: tl.constexpr, CO: tl.constexpr, CI: tl.constexpr, LO: tl.constexpr, LI: tl.constexpr,
    RIGHT: tl.constexpr, EXPAND: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program's tile of the product, as ``matmul_kernel`` says."""
    # Blocks of one token block follow each other, so that x comes from memory once.
    blocks: tl.constexpr = (LO + BN - 1) // BN
    n0 = program % blocks * BN
    t = (program // blocks).to(tl.int64) * BT + tl.arange(0, BT)
    if not EXPAND:
        results = zeros(CO, BT, BN)
        for s in range(S):
            factor = load_tiny(tiny + s * tiny_term, tiny_row, tiny_col, CO, CI)
            results = add_products(
                results, x, large + s * large_term, factor, t, x_stride, T, large_row, large_col, n0,
                CO, CI, LO, LI, RIGHT, True, BT, BN, BK, PRECISION,
            )  # fmt: skip
        store_tiles(results, bias, base, y, alpha, t, T, n0, CO, LO, RIGHT, ACT, BT, BN)
    elif S == 1 and not RIGHT:
        # One tile of the result at a time: fewer registers.
        factor = load_tiny(tiny, tiny_row, tiny_col, CO, CI)
        h = add_products(
            zeros(CI, BT, BN), x, large, factor, t, x_stride, T, large_row, large_col, n0,
            CI, CI, LO, LI, RIGHT, False, BT, BN, BK, PRECISION,
        )  # fmt: skip
        n = n0 + tl.arange(0, BN)[None, :]
        mask = (t[:, None] < T) & (n < LO)
        for row in tl.static_range(CO):
            if partial is not None:
                o = load_tile(other, t, other_stride, T, n0, row, LO, CO, RIGHT, BT, BN)
                store_sums(h, o, partial + program.to(tl.int64) * (CI * CO) + row, CI, CO)
            if y is not None:
                value = contract_row(h, factor, row, CI)
                finish(value, bias, base, y, t[:, None] * (CO * LO), row * LO + n, alpha, mask, ACT)
    else:
        results = zeros(CO, BT, BN)
        for s in range(S):
            factor = load_tiny(tiny + s * tiny_term, tiny_row, tiny_col, CO, CI)
            h = add_products(
                zeros(CI, BT, BN), x, large + s * large_term, factor, t, x_stride, T, large_row, large_col, n0,
                CI, CI, LO, LI, RIGHT, False, BT, BN, BK, PRECISION,
            )  # fmt: skip
            if partial is not None:
                others = load_tiles(other, t, other_stride, T, n0, LO, CO, RIGHT, BT, BN)
                for row in tl.static_range(CO):
                    store_sums(h, others[row], partial + (program.to(tl.int64) * S + s) * (CI * CO) + row, CI, CO)
            if y is not None:
                contracted = ()
                for row in tl.static_range(CO):
                    contracted = contracted + (results[row] + contract_row(h, factor, row, CI),)
                results = contracted
        if y is not None:
            store_tiles(results, bias, base, y, alpha, t, T, n0, CO, LO, RIGHT, ACT, BT, BN)


@triton.jit(do_not_specialize=["T"])
def matmul_kernel(
    x, large, tiny, bias, base, y, other, partial, alpha,
    T, x_stride, other_stride, large_term, large_row, large_col, tiny_term, tiny_row, tiny_col,
    S: tl.constexpr, CO: tl.constexpr, CI: tl.constexpr, LO: tl.constexpr, LI: tl.constexpr,
    RIGHT: tl.constexpr, EXPAND: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y (T, CO * LO)`` of ``x (T, CI * LI)``, ``large (S, LO, LI)``, ``tiny (S, CO, CI)``: see the head of the file.

    y None: nothing but the reduction. partial ``(programs, S, CI, CO)`` or None: no reduction.
    """
    multiply(
        tl.program_id(0), x, large, tiny, bias, base, y, other, partial, alpha,
        T, x_stride, other_stride, large_term, large_row, large_col, tiny_term, tiny_row, tiny_col,
        S, CO, CI, LO, LI, RIGHT, EXPAND, ACT, PRECISION, BT, BN, BK,
    )  # fmt: skip


def kron_matmul(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    """The op ``kron_matmul``; ``packed`` is of the CPU."""
    y = x.new_empty(*x.shape[:-1], a.shape[-2] * b.shape[-2])
    run_product(x, a, b, y, bias, activation)
    return y


def kron_addmm(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The op ``kron_addmm``."""
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    run_product(x, a, b, y, base=base.contiguous(), alpha=alpha)
    return y


def kron_addmm_(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """The op ``kron_addmm_``; base is contiguous. A program reads of it what it writes, and nothing else."""
    run_product(x, a, b, base, base=base, alpha=alpha)


def run_product(
    x: Tensor, a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None, activation: int = 0,
    base: Tensor | None = None, alpha: float | None = None,
) -> None:  # fmt: skip
    """``activation(alpha * product + bias + base)`` into the contiguous ``y (..., m1 * m2)``."""
    if y.numel() == 0:
        return
    a, b = stacks(a, b)
    x = rows(x)
    if bias is not None:
        bias = bias.contiguous()
    product = tiny_product(Product.of(a, b))
    if product is None:
        balanced.forward(x, a, b, y, bias, activation, base, alpha)
        return
    large, tiny = (a, b) if product.right else (b, a)
    run_tiny(product, x, large, tiny, y, bias=bias, activation=activation, base=base, alpha=alpha)


def run_tiny(
    product: TinyProduct, x: Tensor, large: Tensor, tiny: Tensor, y: Tensor | None, *, bias: Tensor | None = None,
    activation: int = 0, base: Tensor | None = None, alpha: float | None = None, other: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """One launch of ``matmul_kernel`` over ``x (T, n)``; with ``other (T, m)`` the tiny gradient in parts."""
    tokens = x.shape[0]
    expand = product.expands or other is not None
    shape = (product, token_bucket(tokens), x.element_size(), expand, other is not None, is_exact(x))
    tiles = matmul_tiles(device_of(x).arch, *shape)
    programs = ceil_div(tokens, tiles.tokens) * ceil_div(product.large_out, tiles.columns)
    partial = None
    if other is not None:
        partial = x.new_empty(programs, product.terms, product.tiny_in, product.tiny_out, dtype=torch.float32)
    strides = (x.stride(0), 0 if other is None else other.stride(0))
    launch(
        matmul_kernel,
        (programs,),
        (x, large, tiny, bias, base, y, other, partial, alpha, tokens, *strides, *large.stride(), *tiny.stride()),
        (*product, expand, activation, precision(), *tiles[:3]),
        Options(*tiles[3:]),
    )
    return partial
