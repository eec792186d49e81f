"""The product with one large and one tiny factor: a matrix product with the tiny mix in its load or its store.

With the tiny factor C (CO, CI) and the large one L (LO, LI), a token's row is a grid of CI values for each of LI, its
result one of CO for each of LO (``primitives.py``):

    contracting   z_g = sum_c C[g, c] x_c  while loading,   y_g = z_g L^T             CO products
    expanding     h_c = x_c L^T,           y_g = sum_c C[g, c] h_c  while storing     CI products

The expanding form can also reduce ``sum_tokens <h_c, o_v>`` against a second tensor o of the result's shape: the tiny
factor's gradient, for which neither h nor anything else of its size is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    activate,
    load_mix,
    load_tile,
    load_tiles,
    mix_column,
    mix_row,
    zeros,
    zip_tiles,
)


@triton.jit
def add_products(
    accs, x, large, factor, t, x_stride, T, large_row, large_col, n0,
    G: tl.constexpr, CI: tl.constexpr, LO: tl.constexpr, LI: tl.constexpr, RIGHT: tl.constexpr, MIX: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to the G accumulators ``(BT, BN)`` the products of one term, of mixed (MIX) or plain tiles of x."""
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
            tile = mix_row(tiles, factor, g, CI).to(weight.dtype) if MIX else tiles[g]
            added = added + (tl.dot(tile, weight, accs[g], input_precision=PRECISION),)
        accs = added
    return accs


@triton.jit
def finish(value, bias, base, y, row_base, columns, alpha, mask, ACT: tl.constexpr):
    """``activation(alpha * value + bias + base)`` into y; bias, base and alpha may be None."""
    if alpha is not None:
        value = value * alpha
    if bias is not None:
        value += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    if base is not None:
        value += tl.load(base + row_base + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row_base + columns, activate(value, ACT, y.dtype.element_ty).to(y.dtype.element_ty), mask=mask)


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
    """One program's tile of the product, as ``mm_kernel`` says."""
    # Blocks of one token block follow each other, so that x comes from memory once.
    blocks: tl.constexpr = (LO + BN - 1) // BN
    n0 = program % blocks * BN
    t = (program // blocks).to(tl.int64) * BT + tl.arange(0, BT)
    if not EXPAND:
        results = zeros(CO, BT, BN)
        for s in range(S):
            factor = load_mix(tiny + s * tiny_term, tiny_row, tiny_col, CO, CI)
            results = add_products(
                results, x, large + s * large_term, factor, t, x_stride, T, large_row, large_col, n0,
                CO, CI, LO, LI, RIGHT, True, BT, BN, BK, PRECISION,
            )  # fmt: skip
        store_tiles(results, bias, base, y, alpha, t, T, n0, CO, LO, RIGHT, ACT, BT, BN)
    elif S == 1 and not RIGHT:
        # One tile of the result at a time: fewer registers.
        factor = load_mix(tiny, tiny_row, tiny_col, CO, CI)
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
                value = mix_row(h, factor, row, CI)
                finish(value, bias, base, y, t[:, None] * (CO * LO), row * LO + n, alpha, mask, ACT)
    else:
        results = zeros(CO, BT, BN)
        for s in range(S):
            factor = load_mix(tiny + s * tiny_term, tiny_row, tiny_col, CO, CI)
            h = add_products(
                zeros(CI, BT, BN), x, large + s * large_term, factor, t, x_stride, T, large_row, large_col, n0,
                CI, CI, LO, LI, RIGHT, False, BT, BN, BK, PRECISION,
            )  # fmt: skip
            if partial is not None:
                others = load_tiles(other, t, other_stride, T, n0, LO, CO, RIGHT, BT, BN)
                for row in tl.static_range(CO):
                    store_sums(h, others[row], partial + (program.to(tl.int64) * S + s) * (CI * CO) + row, CI, CO)
            if y is not None:
                mixed = ()
                for row in tl.static_range(CO):
                    mixed = mixed + (results[row] + mix_row(h, factor, row, CI),)
                results = mixed
        if y is not None:
            store_tiles(results, bias, base, y, alpha, t, T, n0, CO, LO, RIGHT, ACT, BT, BN)


@triton.jit(do_not_specialize=["T"])
def mm_kernel(
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


@triton.jit(do_not_specialize=["T", "tokens_each"])
def large_gradient_kernel(
    u, v, tiny, partial, T, tokens_each, u_stride, v_stride, tiny_term, tiny_row, tiny_col,
    S: tl.constexpr, CO: tl.constexpr, CI: tl.constexpr, LO: tl.constexpr, LI: tl.constexpr,
    RIGHT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``partial (splits, S, LO, LI)``: each split's tokens of the large factor's gradient, sum_t sum_g u_g v_g^T.

    ``u (T, CO * LO)`` is the gradient of the result and ``v (T, CI * LI)`` the input; ``tiny`` mixes whichever has more
    tiles down to as many as the other has.
    """
    blocks: tl.constexpr = (LI + BK - 1) // BK
    block = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    s = tl.program_id(2)
    n0 = block // blocks * BN
    k0 = block % blocks * BK
    factor = load_mix(tiny + s * tiny_term, tiny_row, tiny_col, CO, CI)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    first = split * tokens_each
    last = tl.minimum(first + tokens_each, T)
    for t0 in range(first, last, BT):
        t = t0 + tl.arange(0, BT)
        us = load_tiles(u, t, u_stride, last, n0, LO, CO, RIGHT, BT, BN)
        vs = load_tiles(v, t, v_stride, last, k0, LI, CI, RIGHT, BT, BK)
        if CO <= CI:
            for g in tl.static_range(CO):
                mixed = mix_row(vs, factor, g, CI).to(u.dtype.element_ty)
                acc = tl.dot(tl.trans(us[g]), mixed, acc, input_precision=PRECISION)
        else:
            for g in tl.static_range(CI):
                mixed = mix_column(us, factor, g, CO, CI).to(v.dtype.element_ty)
                acc = tl.dot(tl.trans(mixed), vs[g], acc, input_precision=PRECISION)
    n = n0 + tl.arange(0, BN)[:, None]
    k = k0 + tl.arange(0, BK)[None, :]
    out = partial + (split * S + s) * (LO * LI) + n * LI + k
    tl.store(out, acc, mask=(n < LO) & (k < LI))
