"""Device functions that several kernels share: tiles of the grid that the tiny factor acts on.

A row of activations of a product with a tiny factor of ``C`` columns and a large one of ``K`` holds a grid of both.
Tiny on the left, value (c, k) lies at c * K + k; tiny on the right, at k * C + c. Kernels work on one tile ``(BT, BK)``
for each c, as a tuple of C tiles: then the contraction by the tiny factor is arithmetic on registers of one thread.

The feed-forward block, whose tiny factor is the left one, holds pairs of c in one tile (``R`` = 2): the rows of both,
eight of one and eight of the other in turn, are one dot of twice the rows, in whose accumulator the two values of a
token are in one thread (rows r and r + 8 of a tile of the tensor cores are), so that combining them moves nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COUNT float32 accumulators ``(ROWS, COLS)``."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, COLS], dtype=tl.float32),)
    return tiles


@triton.jit
def unzip(x, BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """``(BT, BK * C)``, value (k, c) at column k * C + c, as a tuple of C tiles ``(BT, BK)``; C a power of two."""
    if C == 1:
        return (tl.reshape(x, [BT, BK]),)
    else:
        even, odd = tl.split(tl.reshape(x, [BT, BK * (C // 2), 2]))
        evens = unzip(even, BT, BK, C // 2)
        odds = unzip(odd, BT, BK, C // 2)
        tiles = ()
        for c in tl.static_range(C // 2):
            tiles = tiles + (evens[c], odds[c])
        return tiles


@triton.jit
def zip_tiles(tiles, BT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr):
    """The inverse of ``unzip``."""
    if C == 1:
        return tl.reshape(tiles[0], [BT, BK])
    else:
        evens = ()
        odds = ()
        for c in tl.static_range(C // 2):
            evens = evens + (tiles[2 * c],)
            odds = odds + (tiles[2 * c + 1],)
        even = zip_tiles(evens, BT, BK, C // 2)
        odd = zip_tiles(odds, BT, BK, C // 2)
        return tl.reshape(tl.join(even, odd), [BT, BK * C])


@triton.jit
def load_tile(
    x, t, row_stride, T, k0, c,
    K: tl.constexpr, C: tl.constexpr, RIGHT: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile c of rows ``t (BT,)`` of ``x (T, C * K)`` from k0 on, ``(BT, BK)``; zeros beyond its edges."""
    k = k0 + tl.arange(0, BK)
    columns = k * C + c if RIGHT else c * K + k
    mask = (t[:, None] < T) & (k[None, :] < K)
    return tl.load(x + t.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_tiles(
    x, t, row_stride, T, k0, K: tl.constexpr, C: tl.constexpr, RIGHT: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr
):
    """All C tiles of rows t from k0 on."""
    if RIGHT and C & (C - 1) == 0:
        # Whole words: the values of one k for all c lie side by side.
        return unzip(load_tile(x, t, row_stride, T, k0 * C, 0, K * C, 1, False, BT, BK * C), BT, BK, C)
    else:
        tiles = ()
        for c in tl.static_range(C):
            tiles = tiles + (load_tile(x, t, row_stride, T, k0, c, K, C, RIGHT, BT, BK),)
        return tiles


@triton.jit
def load_tiny(c, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tiny factor ``(ROWS, COLS)`` as a tuple of float32 scalars, row by row."""
    values = ()
    for row in tl.static_range(ROWS):
        for col in tl.static_range(COLS):
            values = values + (tl.load(c + row * stride_row + col * stride_col).to(tl.float32),)
    return values


@triton.jit
def contract_row(tiles, factor, ROW: tl.constexpr, COLS: tl.constexpr):
    """Row ROW of the tiny factor times COLS tiles: ``(BT, BK)`` float32."""
    return _contract(tiles, factor, ROW * COLS, 1, COLS)


@triton.jit
def contract_column(tiles, factor, COL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Column COL of the tiny factor ``(ROWS, COLS)`` times ROWS tiles: ``(BT, BK)`` float32."""
    return _contract(tiles, factor, COL, COLS, ROWS)


@triton.jit
def _contract(tiles, factor, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    contracted = factor[FIRST] * tiles[0].to(tl.float32)
    for i in tl.static_range(1, COUNT):
        contracted += factor[FIRST + i * STEP] * tiles[i].to(tl.float32)
    return contracted


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
