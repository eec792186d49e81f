"""The feed-forward block whose two pairs chain: product, tiny factor, activation, tiny factor, product; all in one.

Of a token x (C, K): h_c = x_c B1^T, u_m = act(sum_c A1[m, c] h_c + bias1[m]), z_q = sum_m A2[q, m] u_m and
y_q = z_q B2^T + bias2[q], with A1 (M, C), B1 (P, K), A2 (Q, M), B2 (N, P), all contiguous. h, u and z have P columns;
u, which is wide, leaves no program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...schemas.product import Product
from . import matmul
from .activations import activate
from .ffn_tiles import (
    Ffn,
    FfnTiles,
    chained,
    held_block,
    is_one_kernel,
    norm_is_fused,
    pair,
    row_tiles,
    tiles_of,
    z_tiles,
)
from .launch import Options, device_of, launch, precision, rows
from .norm import add_norm, statistics
from .primitives import (
    grid_part,
    grid_rows,
    grid_tile,
    load_columns,
    load_grid,
    load_tiny,
    load_transposed,
    zeros,
)
from .tiles import ceil_div, token_bucket


@triton.jit
def narrow(
    h, bias1, factor1, factor2, p0,
    C: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    CODE: tl.constexpr, dtype: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Tiles ``(BT * R2, BP)`` of z in dtype from those of h, column by column: mix, bias, activation, mix."""
    p = p0 + tl.arange(0, BP)
    parts = ()
    for c in tl.static_range(C):
        parts = parts + (grid_part(h, c, R1, BT, BP),)
    z = zeros(Q, BT, BP)
    for m in tl.static_range(M):
        if bias1 is None:
            pre = factor1[m * C] * parts[0]
        else:
            bias = tl.load(bias1 + m * P + p) if P % BP == 0 else tl.load(bias1 + m * P + p, mask=p < P, other=0.0)
            pre = bias.to(tl.float32)[None, :] + factor1[m * C] * parts[0]
        for c in tl.static_range(1, C):
            pre += factor1[m * C + c] * parts[c]
        u = activate(pre, CODE, dtype)
        contracted = ()
        for q in tl.static_range(Q):
            contracted = contracted + (z[q] + factor2[q * M + m] * u,)
        z = contracted
    tiles = ()
    for index in tl.static_range((Q + R2 - 1) // R2):
        tiles = tiles + (grid_tile(z, index, Q, R2, BT, BP).to(dtype),)
    return tiles


@triton.jit(do_not_specialize=["T"])
def ffn_forward_kernel(
    x, a1, b1, bias1, a2, b2, bias2, residual, norm_weight, norm_bias, y, T, x_stride, residual_stride, eps,
    C: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``y (T, Q * N)`` of ``x (T, C * K)``, BT tokens a program: x and all of y are held, B1 and B2 pass by."""
    KB: tl.constexpr = (K + BK - 1) // BK
    NB: tl.constexpr = (N + BN - 1) // BN
    C_TILES: tl.constexpr = (C + R1 - 1) // R1
    Q_TILES: tl.constexpr = (Q + R2 - 1) // R2
    dtype: tl.constexpr = y.dtype.element_ty
    t0 = tl.program_id(0) * BT
    factor1 = load_tiny(a1, C, 1, M, C)
    factor2 = load_tiny(a2, M, 1, Q, M)
    row, part = grid_rows(BT, R1)
    held = ()
    for index in tl.static_range(C_TILES):
        for block in tl.static_range(KB):
            held = held + (load_grid(x, t0 + row, part, x_stride, T, block * BK, index, C, K, R1, BK),)
    # Outputs start from bias and residual: to load them at the end takes registers there are none of.
    row, part = grid_rows(BT, R2)
    outputs = ()
    for index in tl.static_range(Q_TILES):
        for block in tl.static_range(NB):
            tile = tl.zeros([BT * R2, BN], dtype=tl.float32) + load_columns(bias2, part, index, block, Q, N, R2, BN)
            if residual is not None:
                tile += load_grid(residual, t0 + row, part, residual_stride, T, block * BN, index, Q, N, R2, BN)
            outputs = outputs + (tile,)
    for p0 in range(0, P, BP):
        h = zeros(C_TILES, BT * R1, BP)
        for block in tl.static_range(KB):
            weight = load_transposed(b1, p0, block * BK, P, K, BP, BK)
            dots = ()
            for index in tl.static_range(C_TILES):
                dots = dots + (tl.dot(held[index * KB + block], weight, h[index], input_precision=PRECISION),)
            h = dots
        z = narrow(h, bias1, factor1, factor2, p0, C, M, Q, P, R1, R2, CODE, dtype, BT, BP)
        dots = ()
        for index in tl.static_range(Q_TILES):
            for block in tl.static_range(NB):
                weight = load_transposed(b2, block * BN, p0, N, P, BN, BP)
                dots = dots + (tl.dot(z[index], weight, outputs[index * NB + block], input_precision=PRECISION),)
        outputs = dots
    if norm_weight is not None:
        mean, scale = statistics(outputs, eps, Q, N, R2, BT)
    y += t0.to(tl.int64) * (Q * N)
    for index in tl.static_range(Q_TILES):
        q = index * R2 + part
        for block in tl.static_range(NB):
            n = block * BN + tl.arange(0, BN)
            mask = (row < T - t0)[:, None]
            if Q % R2 != 0:
                mask = mask & (q < Q)[:, None]
            if N % BN != 0:
                mask = mask & (n < N)[None, :]
            columns = (row * (Q * N) + q * N)[:, None] + n[None, :]
            tile = outputs[index * NB + block]
            if norm_weight is not None:
                tile = (tile - mean[:, None]) * scale[:, None]
                tile *= load_columns(norm_weight, part, index, block, Q, N, R2, BN)
                tile += load_columns(norm_bias, part, index, block, Q, N, R2, BN)
            tl.store(y + columns, tile.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T"])
def ffn_middle_kernel(
    x, a1, b1, bias1, a2, z, T, x_stride,
    C: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, P: tl.constexpr, R1: tl.constexpr,
    CODE: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``z (T, Q * P)`` of ``x (T, C * K)``: BT tokens and BP columns a program."""
    C_TILES: tl.constexpr = (C + R1 - 1) // R1
    dtype: tl.constexpr = z.dtype.element_ty
    P_BLOCKS: tl.constexpr = (P + BP - 1) // BP
    program = tl.program_id(0)
    t0 = program // P_BLOCKS * BT
    p0 = program % P_BLOCKS * BP
    row, part = grid_rows(BT, R1)
    h = zeros(C_TILES, BT * R1, BP)
    for k0 in range(0, K, BK):
        weight = load_transposed(b1, p0, k0, P, K, BP, BK)
        dots = ()
        for index in tl.static_range(C_TILES):
            tile = load_grid(x, t0 + row, part, x_stride, T, k0, index, C, K, R1, BK)
            dots = dots + (tl.dot(tile, weight, h[index], input_precision=PRECISION),)
        h = dots
    factor1 = load_tiny(a1, C, 1, M, C)
    factor2 = load_tiny(a2, M, 1, Q, M)
    tiles = narrow(h, bias1, factor1, factor2, p0, C, M, Q, P, R1, 1, CODE, dtype, BT, BP)
    t = tl.arange(0, BT)
    p = p0 + tl.arange(0, BP)
    mask = (t < T - t0)[:, None] & (p < P)[None, :]
    z += t0.to(tl.int64) * (Q * P)
    for q in tl.static_range(Q):
        tl.store(z + (t * (Q * P) + q * P)[:, None] + p[None, :], tiles[q], mask=mask)


@triton.jit(do_not_specialize=["ROWS"])
def ffn_rows_kernel(
    z, b2, bias2, y, ROWS,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``y (ROWS, N) = z (ROWS, P) B2^T + bias2 (Q, N)``, row r with row r % Q of bias2."""
    N_BLOCKS: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    r = (program // N_BLOCKS).to(tl.int64) * BR + tl.arange(0, BR)
    n0 = program % N_BLOCKS * BN
    n = n0 + tl.arange(0, BN)
    tile = tl.zeros([BR, BN], dtype=tl.float32)
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        mask = (r < ROWS)[:, None]
        if P % BP != 0:
            mask = mask & (p < P)[None, :]
        left = tl.load(z + r[:, None] * P + p[None, :], mask=mask, other=0.0)
        tile = tl.dot(left, load_transposed(b2, n0, p0, N, P, BN, BP), tile, input_precision=PRECISION)
    mask = (r < ROWS)[:, None] & (n < N)[None, :]
    if bias2 is not None:
        tile += tl.load(bias2 + (r % Q * N)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + r[:, None] * N + n[None, :], tile.to(y.dtype.element_ty), mask=mask)


def kron_ffn(
    x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, bias2: Tensor | None,
    activation: int, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    packed1: Tensor | None = None, packed2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op ``kron_ffn``; ``packed1`` and ``packed2`` are of the CPU."""
    ffn = chained(Product.of(a1, b1), Product.of(a2, b2))
    norm = residual, norm_weight, norm_bias
    if isinstance(ffn, str):
        y = matmul.kron_matmul(matmul.kron_matmul(x, a1, b1, bias1, activation), a2, b2, bias2, 0)
    else:
        y = x.new_empty(*x.shape[:-1], ffn.q * ffn.n)
        if y.numel() == 0:
            return y
        layers = _layers(x, a1, b1, bias1, a2, b2, bias2)
        x = layers[0]
        device = device_of(x)
        if is_one_kernel(ffn, x.shape[0], x.dtype, device):
            tiles = tiles_of(ffn, x.shape[0], x.dtype, device)
            fused = norm_is_fused(ffn, tiles, x.dtype, device)
            _one_kernel(ffn, tiles, layers, activation, norm if fused else (None,) * 3, eps, y)
            if fused:
                return y
        else:
            _two_kernels(ffn, layers, activation, y)
    if residual is None or norm_weight is None or norm_bias is None:
        return y
    return add_norm(y, residual, norm_weight, norm_bias, eps)


Layers = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


def _layers(
    x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, bias2: Tensor | None
) -> Layers:
    """Operands as the kernels take them: rows of x, and single matrices, contiguous."""
    a1, b1, a2, b2 = (factor[0].contiguous() for factor in (a1, b1, a2, b2))
    bias1, bias2 = (None if bias is None else bias.contiguous() for bias in (bias1, bias2))
    return rows(x), a1, b1, bias1, a2, b2, bias2


def _one_kernel(
    ffn: Ffn, tiles: FfnTiles, layers: Layers, activation: int, norm: tuple[Tensor | None, ...], eps: float, y: Tensor
) -> None:
    x, tokens = layers[0], layers[0].shape[0]
    residual = None if norm[0] is None else rows(norm[0])
    weight, bias = (None if vector is None else vector.contiguous() for vector in norm[1:])
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    blocks = (tiles.tokens, held_block(ffn.k), tiles.columns, held_block(ffn.n))
    launch(
        ffn_forward_kernel,
        (ceil_div(tokens, tiles.tokens),),
        (*layers, residual, weight, bias, y, tokens, *strides, eps),
        (*ffn, pair(ffn.c), pair(ffn.q), activation, precision(), *blocks),
        Options(tiles.num_warps, tiles.num_stages),
    )


def _two_kernels(ffn: Ffn, layers: Layers, activation: int, y: Tensor) -> None:
    x, *first, b2, bias2 = layers
    tokens, arch, element = x.shape[0], device_of(x).arch, x.element_size()
    tiles = z_tiles(arch, ffn, token_bucket(tokens), element)
    z = x.new_empty(tokens * ffn.q, ffn.p)
    launch(
        ffn_middle_kernel,
        (ceil_div(tokens, tiles.tokens) * ceil_div(ffn.p, tiles.columns),),
        (x, *first, z, tokens, x.stride(0)),
        (*ffn[:5], pair(ffn.c), activation, precision(), tiles.tokens, tiles.depth, tiles.columns),
        Options(tiles.num_warps, tiles.num_stages),
    )
    block = row_tiles(arch, ffn, token_bucket(tokens), element)
    launch(
        ffn_rows_kernel,
        (ceil_div(tokens * ffn.q, block.tokens) * ceil_div(ffn.n, block.columns),),
        (z, b2, bias2, y, tokens * ffn.q),
        (ffn.q, ffn.p, ffn.n, precision(), block.tokens, block.depth, block.columns),
        Options(block.num_warps, block.num_stages),
    )
