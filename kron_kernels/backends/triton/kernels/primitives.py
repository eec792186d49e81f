"""Device functions that several kernels share: activations, and tiles of the grid that the tiny factor acts on.

A row of activations of a product with a tiny factor of ``C`` columns and a large one of ``K`` holds a grid of both.
Tiny on the left, value (c, k) lies at c * K + k; tiny on the right, at k * C + c. Kernels work on one tile ``(BT, BK)``
for each c, as a tuple of C tiles: then the mix by the tiny factor is arithmetic on registers of one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _odd(x, coefficients):
    """x P(x^2) by Horner's rule, the constant term first."""
    s = x * x
    value = s * coefficients[len(coefficients) - 1] + coefficients[len(coefficients) - 2]
    for index in tl.static_range(3, len(coefficients) + 1):
        value = s * value + coefficients[len(coefficients) - index]
    return x * value


@triton.jit
def _normal(x):
    """Phi(x), the normal distribution, to 1e-7, and exp(-x^2 / 2).

    Phi(-|x|) = exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.4 |x|): a degree-5 minimax fit, the form of Hastings (1955).
    """
    e = tl.exp2(x * x * -0.7213475204444817)
    t = 1.0 / (1.0 + 0.4 * tl.abs(x))
    tail = 0.188416495 + t * (0.0138675133 + t * (0.338935755 + t * (-0.254272496 + t * 0.056299254)))
    tail = t * (0.156753544 + t * tail) * e
    return tl.where(x < 0.0, tail, 1.0 - tail), e


@triton.jit
def _rough_normal(x, dtype: tl.constexpr):
    """Phi(x) for data of 16 bits by fused multiply-adds alone.

    0.5 + x P(x^2), a minimax fit on |x| <= 4, leaves [0, 1] beyond it: the clamp is free in the last addition.
    """
    if dtype == tl.bfloat16:  # |x| times the error is at most 1.7e-4
        value = _odd(
            x, (0.397988528, -0.0647254512, 0.0088442089, -8.29318073e-4, 4.95819695e-5, -1.68272663e-6, 2.44677558e-8)
        )
    else:  # 3.3e-5
        value = _odd(
            x,
            (
                0.398782998, -0.0661178529, 0.00967000611, -0.00106338575, 8.57232008e-5, -4.86570116e-6,
                1.82073009e-7, -3.99620737e-9, 3.87310878e-11,
            ),
        )  # fmt: skip
    return tl.clamp(value + 0.5, 0.0, 1.0)


@triton.jit
def _rough_tanh_normal(x, dtype: tl.constexpr):
    """0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as ``_rough_normal``; errors 1.5e-4 and 3e-5."""
    if dtype == tl.bfloat16:
        value = _odd(
            x, (0.39806354, -0.0651160255, 0.0090694828, -8.79199128e-4, 5.48922289e-5, -1.95641792e-6, 2.9953835e-8)
        )
    else:
        value = _odd(
            x,
            (
                0.398807228, -0.0664932355, 0.00993287936, -0.00113799609, 9.71788759e-5, -5.9023223e-6,
                2.37423478e-7, -5.60987479e-9, 5.85333795e-11,
            ),
        )  # fmt: skip
    return tl.clamp(value + 0.5, 0.0, 1.0)


@triton.jit
def _tanh_normal(x):
    # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def activate(x, CODE: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """An activation of ``_ops.ACTIVATION_CODES`` of float32 values, to the accuracy that results in dtype need."""
    if CODE == 1:
        if dtype == tl.float32:
            return x * _normal(x)[0]
        else:
            return x * _rough_normal(x, dtype)
    elif CODE == 2:
        if dtype == tl.float32:
            return x * _tanh_normal(x)
        else:
            return x * _rough_tanh_normal(x, dtype)
    elif CODE == 3:
        # Not maximum(x, 0), which would drop NaN.
        return tl.where(x < 0.0, 0.0, x)
    elif CODE == 4:
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def activate_with_gradient(x, CODE: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """``activate`` and its derivative."""
    if CODE == 1:
        if dtype == tl.float32:
            normal, e = _normal(x)
        else:
            normal = _rough_normal(x, dtype)
            e = tl.exp2(x * x * -0.7213475204444817)
        return x * normal, normal + x * (0.3989422804014327 * e)
    elif CODE == 2:
        s = _tanh_normal(x)
        y = x * s
        return y, s + y * (1.0 - s) * (1.5957691216057308 + 0.2140644488 * x * x)
    elif CODE == 3:
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)
    elif CODE == 4:
        s = tl.sigmoid(x)
        y = x * s
        return y, s + y * (1.0 - s)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


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
    return _mix(tiles, factor, ROW * COLS, 1, COLS)


@triton.jit
def mix_column(tiles, factor, COL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Column COL of the tiny factor ``(ROWS, COLS)`` times ROWS tiles: ``(BT, BK)`` float32."""
    return _mix(tiles, factor, COL, COLS, ROWS)


@triton.jit
def _mix(tiles, factor, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    mixed = factor[FIRST] * tiles[0].to(tl.float32)
    for i in tl.static_range(1, COUNT):
        mixed += factor[FIRST + i * STEP] * tiles[i].to(tl.float32)
    return mixed
