"""Device functions that several kernels share: activations, and tiles of the grid that the tiny factor acts on.

A row of activations of a product with a tiny factor of ``C`` columns and a large one of ``K`` holds a grid of both.
Tiny on the left, value (c, k) lies at c * K + k; tiny on the right, at k * C + c. Kernels work on one tile ``(BT, BK)``
for each c, as a tuple of C tiles: then the mix by the tiny factor is arithmetic on registers of one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, CODE: tl.constexpr):
    """An activation of ``_ops.ACTIVATION_CODES`` of float32 values."""
    if CODE == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == 2:
        # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif CODE == 3:
        # Not maximum(x, 0), which would drop NaN.
        return tl.where(x < 0.0, 0.0, x)
    elif CODE == 4:
        return x * tl.sigmoid(x)
    else:
        return x


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
def load_mix(c, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tiny factor ``(ROWS, COLS)`` as a tuple of float32 scalars, row by row."""
    values = ()
    for row in tl.static_range(ROWS):
        for col in tl.static_range(COLS):
            values = values + (tl.load(c + row * stride_row + col * stride_col).to(tl.float32),)
    return values


@triton.jit
def mix_row(tiles, factor, ROW: tl.constexpr, COLS: tl.constexpr):
    """Row ROW of the tiny factor times COLS tiles: ``(BT, BK)`` float32."""
    mixed = factor[ROW * COLS] * tiles[0].to(tl.float32)
    for col in tl.static_range(1, COLS):
        mixed += factor[ROW * COLS + col] * tiles[col].to(tl.float32)
    return mixed
