"""Gradients through the middle of a feed-forward block (``ffn.py``), computed anew; all else are plain products.

With h_c = x_c B1^T and dz_q = dy_q B2 given: du_m = sum_q A2[q, m] dz_q, dpre_m = du_m act'(pre_m) and
dh_c = sum_m A1[m, c] dpre_m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import activate_with_gradient, load_mix, zeros


@triton.jit
def _load_parts(x, t, p, T, C: tl.constexpr, P: tl.constexpr):
    """The C values of rows t, columns p of ``x (T, C * P)``: float32 ``(BT, BP)`` each."""
    mask = (t < T)[:, None] & (p < P)[None, :]
    tiles = ()
    for c in tl.static_range(C):
        tile = tl.load(x + (t.to(tl.int64) * (C * P) + c * P)[:, None] + p[None, :], mask=mask, other=0.0)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def _store_parts(y, tiles, t, p, T, C: tl.constexpr, P: tl.constexpr):
    mask = (t < T)[:, None] & (p < P)[None, :]
    for c in tl.static_range(C):
        pointers = y + (t.to(tl.int64) * (C * P) + c * P)[:, None] + p[None, :]
        tl.store(pointers, tiles[c].to(y.dtype.element_ty), mask=mask)


@triton.jit
def _combine(tiles, factor, START: tl.constexpr, STEP: tl.constexpr):
    """``sum_j factor[START + STEP j] tiles[j]``."""
    total = factor[START] * tiles[0]
    for j in tl.static_range(1, len(tiles)):
        total += factor[START + STEP * j] * tiles[j]
    return total


@triton.jit
def _add_scaled(totals, tile, factor, START: tl.constexpr, STEP: tl.constexpr):
    """``totals[j] + factor[START + STEP j] tile`` for each j."""
    sums = ()
    for j in tl.static_range(len(totals)):
        sums = sums + (totals[j] + factor[START + STEP * j] * tile,)
    return sums


@triton.jit
def _add_products(totals, tile, tiles, START: tl.constexpr, STEP: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr):
    """totals ``(BT, BP / 2)``, those of START + STEP j with the pairs of columns of ``tile * tiles[j]`` added."""
    sums = ()
    for index in tl.static_range(len(totals)):
        if index >= START and (index - START) % STEP == 0 and (index - START) // STEP < len(tiles):
            product = tl.reshape(tile * tiles[(index - START) // STEP], [BT, BP // 2, 2])
            sums = sums + (totals[index] + tl.sum(product, 2),)
        else:
            sums = sums + (totals[index],)
    return sums


@triton.jit(do_not_specialize=["T", "EACH"])
def ffn_backward_kernel(
    h, dz, a1, bias1, a2, dh, z, da1, da2, dbias1, T, EACH,
    C: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, CODE: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """dh ``(T, C * P)``, z ``(T, Q * P)`` of h and dz, whose places they may take; and sums over EACH tokens, float32:

    ``da1 (programs, M, C)``, ``da2 (programs, Q, M)``, ``dbias1 (parts, M * P)``. Outputs that are None are left out;
    so may dz be where only z is asked for.
    """
    dtype: tl.constexpr = h.dtype.element_ty
    program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    start = tl.program_id(1) * EACH
    factor1 = load_mix(a1, C, 1, M, C)
    factor2 = load_mix(a2, M, 1, Q, M)
    sums1 = zeros(M * C if da1 is not None else 0, BT, BP // 2)
    sums2 = zeros(Q * M if da2 is not None else 0, BT, BP // 2)
    sums = zeros(M if dbias1 is not None else 0, BT, BP)
    for t0 in range(start, tl.minimum(start + EACH, T), BT):
        t = t0 + tl.arange(0, BT)
        # Beyond the edges h and dz are zero, and so is what they add to a sum of products with them.
        narrow = _load_parts(h, t, p, T, C, P)
        if dz is not None:
            narrow_gradients = _load_parts(dz, t, p, T, Q, P)
        added = zeros(Q, BT, BP)
        gradients = zeros(C, BT, BP)
        for m in tl.static_range(M):
            pre = _combine(narrow, factor1, m * C, 1)
            if bias1 is not None:
                pre += tl.load(bias1 + m * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
            u, slope = activate_with_gradient(pre, CODE, dtype)
            if z is not None:
                added = _add_scaled(added, u, factor2, m, M)
            if dz is not None:
                if da2 is not None:
                    sums2 = _add_products(sums2, u, narrow_gradients, m, M, BT, BP)
                dpre = _combine(narrow_gradients, factor2, m, M) * slope
                if dh is not None:
                    gradients = _add_scaled(gradients, dpre, factor1, m * C, 1)
                if da1 is not None:
                    sums1 = _add_products(sums1, dpre, narrow, m * C, 1, BT, BP)
                if dbias1 is not None:
                    changed = ()
                    for index in tl.static_range(M):
                        changed = changed + (sums[index] + dpre if index == m else sums[index],)
                    sums = changed
        if z is not None:
            _store_parts(z, added, t, p, T, Q, P)
        if dh is not None:
            _store_parts(dh, gradients, t, p, T, C, P)
    for index in tl.static_range(len(sums1)):
        tl.store(da1 + program * (M * C) + index, tl.sum(sums1[index]))
    for index in tl.static_range(len(sums2)):
        tl.store(da2 + program * (Q * M) + index, tl.sum(sums2[index]))
    for m in tl.static_range(len(sums)):
        tl.store(dbias1 + tl.program_id(1).to(tl.int64) * (M * P) + m * P + p, tl.sum(sums[m], 0), mask=p < P)
