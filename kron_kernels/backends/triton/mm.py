"""Launchers of products: with one tiny factor (``kernels/mm.py``), or with two that a program holds (``chain.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...schemas.matmul import MATMUL_GRADIENTS
from ...schemas.product import Product, stacks
from ...schemas.registry import needed
from . import chain
from .kernels import mm as kernels
from .launch import Options, device_of, launch
from .operands import is_exact, precision, rows
from .plan import (
    MixedProduct,
    ceil_div,
    large_gradient_tiles,
    mixed,
    mm_tiles,
    splits,
    token_bucket,
)
from .sums import sum_partials


def kron_matmul(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    """The op ``kron_matmul``; ``packed`` is of the CPU."""
    y = x.new_empty(*x.shape[:-1], a.shape[-2] * b.shape[-2])
    run_product(x, a, b, y, bias, activation)
    return y


def kron_addmm(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The op ``kron_addmm``."""
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    run_product(x, a, b, y, base=base.contiguous(), alpha=alpha)
    return y


def kron_addmm_(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """The op ``kron_addmm_``; base is contiguous. A program reads of it what it writes, and nothing else."""
    run_product(x, a, b, base, base=base, alpha=alpha)


def run_product(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    base: Tensor | None = None,
    alpha: float | None = None,
) -> None:
    """``activation(alpha * product + bias + base)`` into the contiguous ``y (..., m1 * m2)``."""
    if y.numel() == 0:
        return
    a, b = stacks(a, b)
    x = rows(x)
    if bias is not None:
        bias = bias.contiguous()
    product = mixed(Product.of(a, b))
    if product is None:
        chain.forward(x, a, b, y, bias, activation, base, alpha)
        return
    large, tiny = (a, b) if product.right else (b, a)
    run_mixed(product, x, large, tiny, y, bias=bias, activation=activation, base=base, alpha=alpha)


def run_mixed(
    product: MixedProduct,
    x: Tensor,
    large: Tensor,
    tiny: Tensor,
    y: Tensor | None,
    *,
    bias: Tensor | None = None,
    activation: int = 0,
    base: Tensor | None = None,
    alpha: float | None = None,
    other: Tensor | None = None,
) -> Tensor | None:
    """One launch of ``mm_kernel`` over ``x (T, n)``; with ``other (T, m)`` the partial sums of the tiny gradient."""
    tokens = x.shape[0]
    expand = product.expands or other is not None
    shape = (product, token_bucket(tokens), x.element_size(), expand, other is not None, is_exact(x))
    tiles = mm_tiles(device_of(x).arch, *shape)
    programs = ceil_div(tokens, tiles.tokens) * ceil_div(product.large_out, tiles.columns)
    partial = None
    if other is not None:
        partial = x.new_empty(programs, product.terms, product.tiny_in, product.tiny_out, dtype=torch.float32)
    strides = (x.stride(0), 0 if other is None else other.stride(0))
    launch(
        kernels.mm_kernel,
        (programs,),
        (x, large, tiny, bias, base, y, other, partial, alpha, tokens, *strides, *large.stride(), *tiny.stride()),
        (*product, expand, activation, precision(x), *tiles[:3]),
        Options(*tiles[3:]),
    )
    return partial


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
    product = mixed(Product.of(a, b))
    if x.numel() == 0 or grad.numel() == 0:
        for out in (dx, da, db):
            if out is not None:
                out.zero_()
    elif product is None:
        chain.backward(grad, x, a, b, dx, da, db)
    elif product.right:
        _mixed_backward(product, grad, x, a, b, dx, da, db)
    else:
        _mixed_backward(product, grad, x, b, a, dx, db, da)
    nothing = x.new_empty(0)
    dx, da, db, dbias = (nothing if out is None else out for out in (dx, da, db, dbias))
    return dx, da, db, dbias


def _mixed_backward(
    product: MixedProduct,
    grad: Tensor,
    x: Tensor,
    large: Tensor,
    tiny: Tensor,
    dx: Tensor | None,
    dlarge: Tensor | None,
    dtiny: Tensor | None,
) -> None:
    """Gradients of a product with a tiny factor, into those that are not None.

    That of x is the transposed product. Where its mix comes after the large factor, the tiny factor's gradient is
    reduced in the same pass; otherwise that takes the forward's products once more.
    """
    terms, tiny_out, tiny_in, large_out, large_in, right = product
    transposed = MixedProduct(terms, tiny_in, tiny_out, large_in, large_out, right)
    reduces = dtiny is not None and tiny_in >= tiny_out
    if dx is not None or reduces:
        partial = run_mixed(transposed, grad, large.mT, tiny.mT, dx, other=x if reduces else None)
        if partial is not None and dtiny is not None:
            sum_partials(partial, dtiny)
    if dtiny is not None and not reduces:
        partial = run_mixed(product, x, large, tiny, None, other=grad)
        if partial is not None:
            sum_partials(partial, dtiny, transposed=True)
    if dlarge is not None:
        _large_gradient(product, grad, x, tiny, dlarge)


def _large_gradient(product: MixedProduct, grad: Tensor, x: Tensor, tiny: Tensor, dlarge: Tensor) -> None:
    tokens = x.shape[0]
    device = device_of(x)
    tiles = large_gradient_tiles(device.arch, product, token_bucket(tokens), x.element_size(), is_exact(x))
    blocks = ceil_div(product.large_out, tiles.columns) * ceil_div(product.large_in, tiles.depth)
    parts, each = splits(tokens, tiles.tokens, blocks * product.terms, device.multiprocessors)
    partial = x.new_empty(parts, *dlarge.shape, dtype=torch.float32)
    launch(
        kernels.large_gradient_kernel,
        (blocks, parts, product.terms),
        (grad, x, tiny, partial, tokens, each, grad.stride(0), x.stride(0), *tiny.stride()),
        (*product, precision(x), *tiles[:3]),
        Options(*tiles[3:]),
    )
    sum_partials(partial, dlarge)
