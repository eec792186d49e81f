"""Tiles of activations ``(T, C * K)`` of a product whose tiny factor is the left one: value c is K in a row.

A tile of one c holds a token a row. One of a pair of c (``R`` = 2) has the rows of both, eight of one and eight of the
other in turn: one dot of twice the rows, in whose accumulator the two values of a token are in one thread (rows r and
r + 8 of a tile of the tensor cores are), so that mixing them moves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grid_rows(BT: tl.constexpr, R: tl.constexpr):
    """Of each row of a tile of BT tokens: its token, and which of the tile's R values of c it holds."""
    row = tl.arange(0, BT * R)
    if R == 1:
        return row, row * 0
    else:
        return row // 16 * 8 + row % 8, row // 8 % 2


@triton.jit
def grid_part(tiles, INDEX: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Value INDEX of c, ``(BT, BK)``, of tiles ``(BT * R, BK)``."""
    if R == 1:
        return tiles[INDEX]
    else:
        # (BT / 8, 2, 8, BK) -> (BT / 8, 8, BK, 2)
        pair = tl.permute(tl.reshape(tiles[INDEX // 2], [BT // 8, 2, 8, BK]), [0, 2, 3, 1])
        even, odd = tl.split(pair)
        return tl.reshape(odd if INDEX % 2 == 1 else even, [BT, BK])


@triton.jit
def grid_tile(parts, INDEX: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """Tile INDEX ``(BT * R, BK)`` of C values, each ``(BT, BK)``; the inverse of ``grid_part``. Beyond C: anything."""
    if R == 1:
        return parts[INDEX]
    else:
        even = tl.reshape(parts[2 * INDEX], [BT // 8, 8, BK])
        odd = tl.reshape(parts[2 * INDEX + 1 if 2 * INDEX + 1 < C else 2 * INDEX], [BT // 8, 8, BK])
        return tl.reshape(tl.permute(tl.join(even, odd), [0, 3, 1, 2]), [2 * BT, BK])


@triton.jit
def load_grid(
    x, t, part, row_stride, T, k0,
    INDEX: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile INDEX ``(BT * R, BK)`` of the rows ``(t, part)`` of ``x (T, C * K)``, from column k0 of each value on."""
    k = k0 + tl.arange(0, BK)
    c = INDEX * R + part
    mask = (t < T)[:, None]
    if C % R != 0:
        mask = mask & (c < C)[:, None]
    if K % BK != 0:
        mask = mask & (k < K)[None, :]
    return tl.load(x + (t.to(tl.int64) * row_stride + c * K)[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(
    vector, part,
    INDEX: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Block BLOCK of ``vector (C * K,)`` for tile INDEX: float32 that broadcasts to ``(BT * R, BK)``; None: zeros."""
    if vector is None:
        return tl.zeros([1, BK], dtype=tl.float32)
    else:
        k = BLOCK * BK + tl.arange(0, BK)
        even = tl.load(vector + INDEX * R * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if R == 1 or INDEX * R + 1 >= C:
            return even
        else:
            odd = tl.load(vector + (INDEX * R + 1) * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            return tl.where((part == 0)[:, None], even, odd)


@triton.jit
def load_transposed(b, r0, c0, ROWS: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The tile ``(BC, BR)`` of the transpose of ``b (ROWS, COLS)``, contiguous; zeros beyond its edges."""
    r = r0 + tl.arange(0, BR)
    c = c0 + tl.arange(0, BC)
    pointers = b + c[:, None] + r[None, :] * COLS
    if ROWS % BR == 0 and COLS % BC == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(c < COLS)[:, None] & (r < ROWS)[None, :], other=0.0)
