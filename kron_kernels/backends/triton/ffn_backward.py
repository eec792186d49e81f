"""The gradients of the feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...schemas import reference
from ...schemas.ffn import FFN_GRADIENTS
from ...schemas.product import Product
from ...schemas.registry import ACTIVATION_NAMES, needed, needs_mask
from . import mm
from .ffn_plan import Ffn, chained, middle_tiles
from .kernels.ffn_backward import ffn_backward_kernel
from .launch import Options, device_of, launch
from .operands import rows
from .plan import ceil_div, splits, token_bucket
from .sums import sum_partials

# Programs of the middle that a multiprocessor holds at a time: they are of few warps.
_PROGRAMS = 4


def kron_ffn_backward(
    grad: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """The op ``kron_ffn_backward``."""
    ffn = chained(Product.of(a1, b1), Product.of(a2, b2))
    asked = needed(needs, len(FFN_GRADIENTS))
    if isinstance(ffn, str):
        found = _as_two_products(grad, x, a1, b1, bias1, a2, b2, activation, asked)
    elif x.numel() == 0 or grad.numel() == 0:
        shapes = (x.shape, a1.shape, b1.shape, (ffn.m * ffn.p,), a2.shape, b2.shape, (ffn.q * ffn.n,))
        found = [x.new_zeros(shape) if need else None for shape, need in zip(shapes, asked, strict=True)]
    else:
        found = _narrow(ffn, rows(grad), x, a1, b1, bias1, a2, b2, activation, asked)
    return tuple(x.new_empty(0) if out is None else out for out in found)


def _narrow(
    ffn: Ffn,
    grad: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    activation: int,
    asked: tuple[bool, ...],
) -> list[Tensor | None]:
    """By products with the large factors on rows of single values of the grids, and one kernel between them."""
    need_x, need_a1, need_b1, need_bias1, need_a2, need_b2, need_bias2 = asked
    need_dh, need_sums = need_x or need_b1, need_a1 or need_a2 or need_bias1
    (large1,), (large2,) = b1, b2
    dx = da1 = db1 = dbias1 = da2 = db2 = None
    if need_dh or need_sums or need_b2:
        # (T * C, K), (T * Q, N)
        x_rows, grad_rows = rows(x).reshape(-1, ffn.k), grad.reshape(-1, ffn.n)
        h = x_rows @ large1.mT
        dz = grad_rows @ large2 if need_dh or need_sums else None
        z = None if not need_b2 else h.new_empty(grad_rows.shape[0], ffn.p) if dz is None else dz
        dh = h if need_dh else None
        da1, da2 = (a.new_empty(a.shape) if need else None for a, need in ((a1, need_a1), (a2, need_a2)))
        dbias1 = x.new_empty(ffn.m * ffn.p) if need_bias1 else None
        _middle(ffn, h, dz, a1, bias1, a2, activation, dh, z, (da1, da2, dbias1))
        if dh is not None and need_x:
            dx = (dh @ large1).view(x.shape)
        if dh is not None and need_b1:
            db1 = _sum_over_rows(dh, x_rows).unsqueeze(0)
        if z is not None:
            db2 = _sum_over_rows(grad_rows, z).unsqueeze(0)
    return [dx, da1, db1, dbias1, da2, db2, grad.sum(0) if need_bias2 else None]


def _middle(
    ffn: Ffn,
    h: Tensor,
    dz: Tensor | None,
    a1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    activation: int,
    dh: Tensor | None,
    z: Tensor | None,
    outs: tuple[Tensor | None, ...],
) -> None:
    """One launch of ``ffn_backward_kernel`` and the second stage of its sums: outs are da1, da2 and dbias1."""
    tokens, device = h.shape[0] // ffn.c, device_of(h)
    tiles = middle_tiles(device.arch, ffn, token_bucket(tokens), h.element_size())
    blocks = ceil_div(ffn.p, tiles.columns)
    parts, each = splits(tokens, tiles.tokens, blocks, _PROGRAMS * device.multiprocessors)
    partial = [
        None if out is None else h.new_empty(count, out.numel(), dtype=torch.float32)
        for out, count in zip(outs, (blocks * parts, blocks * parts, parts), strict=True)
    ]
    bias1 = None if bias1 is None else bias1.contiguous()
    launch(
        ffn_backward_kernel,
        (blocks, parts),
        (h, dz, a1.contiguous(), bias1, a2.contiguous(), dh, z, *partial, tokens, each),
        (ffn.c, ffn.m, ffn.q, ffn.p, activation, tiles.tokens, tiles.columns),
        Options(tiles.num_warps, tiles.num_stages),
    )
    for sums, out in zip(partial, outs, strict=True):
        if sums is not None and out is not None:
            sum_partials(sums, out)


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right``, a sum over so many rows that parts of it must not be rounded to 16 bits on the way."""
    if left.is_cuda and torch.version.cuda and left.dtype is not torch.float32:
        return torch.mm(left.mT, right, out_dtype=torch.float32).to(left.dtype)
    return left.mT @ right


def _as_two_products(
    grad: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    activation: int,
    asked: tuple[bool, ...],
) -> list[Tensor | None]:
    need_x, need_a1, need_b1, need_bias1, need_a2, need_b2, need_bias2 = asked
    first = need_x, need_a1, need_b1, need_bias1
    hidden = mm.kron_matmul(x, a1, b1, bias1, 0).requires_grad_()
    name = ACTIVATION_NAMES[activation]
    with torch.enable_grad():
        active = hidden if name is None else reference.ACTIVATIONS[name](hidden)
    through, da2, db2, dbias2 = mm.kron_matmul_backward(
        grad, active.detach(), a2, b2, needs_mask((any(first), need_a2, need_b2, need_bias2))
    )
    found: tuple[Tensor | None, ...] = (None,) * 4
    if any(first):
        (grad_hidden,) = torch.autograd.grad(active, hidden, through.view(active.shape))
        found = mm.kron_matmul_backward(grad_hidden, x, a1, b1, needs_mask(first))
    return [*found, da2, db2, dbias2]
