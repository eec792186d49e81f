"""Gradients of a product: the transposed product, the reduction of its store, and the large factor's kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...schemas.matmul import MATMUL_GRADIENTS
from ...schemas.product import Product
from ...schemas.registry import needed
from . import balanced
from .launch import Options, device_of, is_exact, launch, precision, rows
from .matmul import run_tiny
from .primitives import contract_column, contract_row, load_tiles, load_tiny
from .sums import sum_partials
from .tiles import TinyProduct, ceil_div, large_gradient_tiles, splits, tiny_product, token_bucket


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
    factor = load_tiny(tiny + s * tiny_term, tiny_row, tiny_col, CO, CI)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    first = split * tokens_each
    last = tl.minimum(first + tokens_each, T)
    for t0 in range(first, last, BT):
        t = t0 + tl.arange(0, BT)
        us = load_tiles(u, t, u_stride, last, n0, LO, CO, RIGHT, BT, BN)
        vs = load_tiles(v, t, v_stride, last, k0, LI, CI, RIGHT, BT, BK)
        if CO <= CI:
            for g in tl.static_range(CO):
                contracted = contract_row(vs, factor, g, CI).to(u.dtype.element_ty)
                acc = tl.dot(tl.trans(us[g]), contracted, acc, input_precision=PRECISION)
        else:
            for g in tl.static_range(CI):
                contracted = contract_column(us, factor, g, CO, CI).to(v.dtype.element_ty)
                acc = tl.dot(tl.trans(contracted), vs[g], acc, input_precision=PRECISION)
    n = n0 + tl.arange(0, BN)[:, None]
    k = k0 + tl.arange(0, BK)[None, :]
    out = partial + (split * S + s) * (LO * LI) + n * LI + k
    tl.store(out, acc, mask=(n < LO) & (k < LI))


def kron_matmul_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``kron_matmul_backward``."""
    need_x, need_a, need_b, need_bias = needed(needs, len(MATMUL_GRADIENTS))
    dx, da, db = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
        for need, tensor in ((need_x, x), (need_a, a), (need_b, b))
    )
    grad, x = rows(grad), rows(x)
    dbias = grad.sum(0) if need_bias else None
    product = tiny_product(Product.of(a, b))
    if x.numel() == 0 or grad.numel() == 0:
        for out in (dx, da, db):
            if out is not None:
                out.zero_()
    elif product is None:
        balanced.backward(grad, x, a, b, dx, da, db)
    elif product.right:
        _tiny_backward(product, grad, x, a, b, dx, da, db)
    else:
        _tiny_backward(product, grad, x, b, a, dx, db, da)
    nothing = x.new_empty(0)
    dx, da, db, dbias = (nothing if out is None else out for out in (dx, da, db, dbias))
    return dx, da, db, dbias


def _tiny_backward(
    product: TinyProduct, grad: Tensor, x: Tensor, large: Tensor, tiny: Tensor, dx: Tensor | None,
    dlarge: Tensor | None, dtiny: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of a product with a tiny factor, into those that are not None.

    That of x is the transposed product. Where its mix comes after the large factor, the tiny factor's gradient is
    reduced in the same pass; otherwise that takes the forward's products once more.
    """
    terms, tiny_out, tiny_in, large_out, large_in, right = product
    transposed = TinyProduct(terms, tiny_in, tiny_out, large_in, large_out, right)
    reduces = dtiny is not None and tiny_in >= tiny_out
    if dx is not None or reduces:
        partial = run_tiny(transposed, grad, large.mT, tiny.mT, dx, other=x if reduces else None)
        if partial is not None and dtiny is not None:
            sum_partials(partial, dtiny)
    if dtiny is not None and not reduces:
        partial = run_tiny(product, x, large, tiny, None, other=grad)
        if partial is not None:
            sum_partials(partial, dtiny, transposed=True)
    if dlarge is not None:
        _large_gradient(product, grad, x, tiny, dlarge)


def _large_gradient(product: TinyProduct, grad: Tensor, x: Tensor, tiny: Tensor, dlarge: Tensor) -> None:
    tokens = x.shape[0]
    device = device_of(x)
    tiles = large_gradient_tiles(device.arch, product, token_bucket(tokens), x.element_size(), is_exact(x))
    blocks = ceil_div(product.large_out, tiles.columns) * ceil_div(product.large_in, tiles.depth)
    parts, each = splits(tokens, tiles.tokens, blocks * product.terms, device.multiprocessors)
    partial = x.new_empty(parts, *dlarge.shape, dtype=torch.float32)
    launch(
        large_gradient_kernel,
        (blocks, parts, product.terms),
        (grad, x, tiny, partial, tokens, each, grad.stride(0), x.stride(0), *tiny.stride()),
        (*product, precision(), *tiles[:3]),
        Options(*tiles[3:]),
    )
    sum_partials(partial, dlarge)
