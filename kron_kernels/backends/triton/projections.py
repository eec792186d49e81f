"""Launcher of several products of one input (``kernels/projections.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...schemas.product import Product
from .kernels.projections import projections_kernel
from .launch import Options, device_of, launch
from .mm import run_product
from .operands import is_exact, precision, rows
from .plan import MixedProduct, ceil_div, mixed, mm_tiles, token_bucket

# Projections of one launch.
_MOST = 4


def kron_qkv(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[Tensor]:
    """The op ``kron_qkv``; ``packed`` is of the CPU.

    Neighbours of one shape with a tiny factor go into one launch. Other products are launched one by one: those that
    programs hold whole read x once anyway.
    """
    results = [x.new_empty(*x.shape[:-1], left.shape[1] * right.shape[1]) for left, right in zip(a, b, strict=True)]
    x = rows(x)
    if x.shape[0] == 0:
        return results
    first = 0
    while first < len(a):
        last = first + 1
        while last < min(len(a), first + _MOST) and _alike(a[first], a[last]) and _alike(b[first], b[last]):
            last += 1
        product = mixed(Product.of(a[first], b[first]))
        if product is None or last - first == 1:
            for i in range(first, last):
                run_product(x, a[i], b[i], results[i], bias[i] if bias else None)
        else:
            group = slice(first, last)
            _run_group(product, x, a[group], b[group], bias[group], results[group])
        first = last
    return results


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride()


def _run_group(
    product: MixedProduct,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    """One launch for two to four products ``x (T, n)`` of one shape and of the same strides."""
    count, tokens = len(a), x.shape[0]
    large, tiny = (a, b) if product.right else (b, a)
    shape = (product, token_bucket(tokens), x.element_size(), product.expands, False, is_exact(x))
    tiles = mm_tiles(device_of(x).arch, *shape)
    programs = count * ceil_div(tokens, tiles.tokens) * ceil_div(product.large_out, tiles.columns)
    biases: Sequence[Tensor | None] = [each.contiguous() for each in bias] or [None]
    operands: tuple[Sequence[Tensor | None], ...] = (large, tiny, biases, results)
    pointers = (each[min(i, len(each) - 1)] for each in operands for i in range(_MOST))
    launch(
        projections_kernel,
        (programs,),
        (x, *pointers, tokens, x.stride(0), *large[0].stride(), *tiny[0].stride()),
        (count, *product, product.expands, precision(x), *tiles[:3]),
        Options(*tiles[3:]),
    )
