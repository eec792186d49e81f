"""Launchers of the product of two middling factors, each held whole by a program."""

from __future__ import annotations

import torch
from torch import Tensor

from ...schemas.product import Product
from .kernels import chain as kernels
from .launch import Options, device_of, launch
from .operands import precision
from .plan import (
    ceil_div,
    chain_gradient_tiles,
    chain_tiles,
    left_first,
    padded,
    token_bucket,
)
from .sums import sum_partials


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    base: Tensor | None = None,
    alpha: float | None = None,
) -> None:
    """``activation(alpha * product + bias + base)`` of ``x (T, n1 * n2)`` and stacked factors into the contiguous y."""
    product = Product.of(a, b)
    block, *options = chain_tiles(device_of(x).arch, product, token_bucket(x.shape[0]), x.element_size())
    launch(
        kernels.chain_kernel,
        (ceil_div(x.shape[0], block),),
        (x, a, b, bias, base, y, alpha, x.shape[0], x.stride(0), *a.stride(), *b.stride()),
        (*product, left_first(product), activation, precision(x), block, *padded(product)),
        Options(*options),
    )


def backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, dx: Tensor | None, da: Tensor | None, db: Tensor | None
) -> None:
    """Gradients of the product from ``grad (T, m1 * m2)``, into those that are not None."""
    if dx is not None:
        forward(grad, a.mT, b.mT, dx)
    if da is None and db is None:
        return
    product = Product.of(a, b)
    tokens = x.shape[0]
    device = device_of(x)
    block, *options = chain_gradient_tiles(device.arch, product, token_bucket(tokens), x.element_size())
    blocks = ceil_div(tokens, block)
    each = ceil_div(blocks, max(1, 2 * device.multiprocessors // product.terms))
    programs = ceil_div(blocks, each)
    partial_a, partial_b = (
        None if out is None else x.new_empty(programs, *out.shape, dtype=torch.float32) for out in (da, db)
    )
    launch(
        kernels.chain_gradient_kernel,
        (programs, product.terms),
        (grad, x, a, b, partial_a, partial_b, tokens, each, grad.stride(0), x.stride(0), *a.stride(), *b.stride()),
        (*product, precision(x), block, *padded(product)),
        Options(*options),
    )
    for partial, out in ((partial_a, da), (partial_b, db)):
        if partial is not None and out is not None:
            sum_partials(partial, out)
