"""The gradients of the feed-forward block: those through its middle, which is recomputed, and plain products.

With h_c = x_c B1^T and dz_q = dy_q B2 given: du_m = sum_q A2[q, m] dz_q, dpre_m = du_m act'(pre_m) and
dh_c = sum_m A1[m, c] dpre_m.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas import reference
from ...schemas.ffn import FFN_GRADIENTS
from ...schemas.product import Product
from ...schemas.registry import ACTIVATION_NAMES, needed, needs_mask
from .activations import activate_with_gradient
from .ffn_tiles import Ffn, chained, middle_tiles
from .launch import Options, device_of, launch, rows
from .matmul import kron_matmul
from .matmul_backward import kron_matmul_backward
from .primitives import load_tiny, zeros
from .sums import sum_partials
from .tiles import ceil_div, splits, token_bucket

# Programs of the middle that a multiprocessor holds at a time: they are of few warps.
_PROGRAMS = 4


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
    factor1 = load_tiny(a1, C, 1, M, C)
    factor2 = load_tiny(a2, M, 1, Q, M)
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


def kron_ffn_backward(
    grad: Tensor, x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, activation: int,
    needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
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
    ffn: Ffn, grad: Tensor, x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor,
    activation: int, asked: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
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
    ffn: Ffn, h: Tensor, dz: Tensor | None, a1: Tensor, bias1: Tensor | None, a2: Tensor, activation: int,
    dh: Tensor | None, z: Tensor | None, outs: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
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
    grad: Tensor, x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, activation: int,
    asked: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    need_x, need_a1, need_b1, need_bias1, need_a2, need_b2, need_bias2 = asked
    first = need_x, need_a1, need_b1, need_bias1
    hidden = kron_matmul(x, a1, b1, bias1, 0).requires_grad_()
    name = ACTIVATION_NAMES[activation]
    with torch.enable_grad():
        active = hidden if name is None else reference.ACTIVATIONS[name](hidden)
    through, da2, db2, dbias2 = kron_matmul_backward(
        grad, active.detach(), a2, b2, needs_mask((any(first), need_a2, need_b2, need_bias2))
    )
    found: tuple[Tensor | None, ...] = (None,) * 4
    if any(first):
        (grad_hidden,) = torch.autograd.grad(active, hidden, through.view(active.shape))
        found = kron_matmul_backward(grad_hidden, x, a1, b1, needs_mask(first))
    return [*found, da2, db2, dbias2]
