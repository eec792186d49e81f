"""Launchers of the feed-forward block."""

from __future__ import annotations

from torch import Tensor

from ...schemas.product import Product
from . import mm
from .ffn_plan import (
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
from .kernels import ffn as kernels
from .launch import Options, device_of, launch
from .operands import precision, rows
from .plan import ceil_div, token_bucket
from .rows import add_norm


def kron_ffn(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    activation: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    packed1: Tensor | None = None,
    packed2: Tensor | None = None,
) -> Tensor:
    """The op ``kron_ffn``; ``packed1`` and ``packed2`` are of the CPU."""
    ffn = chained(Product.of(a1, b1), Product.of(a2, b2))
    norm = None
    if residual is not None and norm_weight is not None and norm_bias is not None:
        norm = residual, norm_weight, norm_bias
    if isinstance(ffn, str):
        y = mm.kron_matmul(mm.kron_matmul(x, a1, b1, bias1, activation), a2, b2, bias2, 0)
    else:
        y = x.new_empty(*x.shape[:-1], ffn.q * ffn.n)
        if y.numel() == 0:
            return y
        layers = _layers(x, a1, b1, bias1, a2, b2, bias2)
        x = layers[0]
        device = device_of(x)
        if is_one_kernel(ffn, x.shape[0], x.dtype, device):
            tiles = tiles_of(ffn, x.shape[0], x.dtype, device)
            fused = norm if norm_is_fused(ffn, tiles, x.dtype, device) else None
            _one_kernel(ffn, tiles, layers, activation, fused, eps, y)
            if fused is not None:
                return y
        else:
            _two_kernels(ffn, layers, activation, y)
    return y if norm is None else add_norm(y, *norm, eps)


Layers = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


def _layers(
    x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, bias2: Tensor | None
) -> Layers:
    """Operands as the kernels take them: rows of x, and single matrices, contiguous."""
    a1, b1, a2, b2 = (factor[0].contiguous() for factor in (a1, b1, a2, b2))
    bias1, bias2 = (None if bias is None else bias.contiguous() for bias in (bias1, bias2))
    return rows(x), a1, b1, bias1, a2, b2, bias2


def _one_kernel(
    ffn: Ffn,
    tiles: FfnTiles,
    layers: Layers,
    activation: int,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    eps: float,
    y: Tensor,
) -> None:
    x, tokens = layers[0], layers[0].shape[0]
    residual = weight = bias = None
    if norm is not None:
        residual, weight, bias = rows(norm[0]), norm[1].contiguous(), norm[2].contiguous()
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    blocks = (tiles.tokens, held_block(ffn.k), tiles.columns, held_block(ffn.n))
    launch(
        kernels.ffn_forward_kernel,
        (ceil_div(tokens, tiles.tokens),),
        (*layers, residual, weight, bias, y, tokens, *strides, eps),
        (*ffn, pair(ffn.c), pair(ffn.q), activation, precision(x), *blocks),
        Options(tiles.num_warps, tiles.num_stages),
    )


def _two_kernels(ffn: Ffn, layers: Layers, activation: int, y: Tensor) -> None:
    x, *first, b2, bias2 = layers
    tokens, arch, element = x.shape[0], device_of(x).arch, x.element_size()
    tiles = z_tiles(arch, ffn, token_bucket(tokens), element)
    z = x.new_empty(tokens * ffn.q, ffn.p)
    launch(
        kernels.ffn_middle_kernel,
        (ceil_div(tokens, tiles.tokens) * ceil_div(ffn.p, tiles.columns),),
        (x, *first, z, tokens, x.stride(0)),
        (*ffn[:5], pair(ffn.c), activation, precision(x), tiles.tokens, tiles.depth, tiles.columns),
        Options(tiles.num_warps, tiles.num_stages),
    )
    block = row_tiles(arch, ffn, token_bucket(tokens), element)
    launch(
        kernels.ffn_rows_kernel,
        (ceil_div(tokens * ffn.q, block.rows) * ceil_div(ffn.n, block.columns),),
        (z, b2, bias2, y, tokens * ffn.q),
        (ffn.q, ffn.p, ffn.n, precision(x), block.rows, block.depth, block.columns),
        Options(block.num_warps, block.num_stages),
    )
