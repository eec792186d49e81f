"""Which kernel a product takes, and its tiles: pure functions of sizes. No Triton here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...schemas.product import TINY, Product
from ..base import Device as Device
from .tuned import tunable

# 32-bit registers of a thread that tiles may take: of its 255, what addresses and temporaries leave; and where
# operands of float32 go through registers besides.
_REGISTERS, _EXACT_REGISTERS = 100, 48
# Bytes of shared memory on the smallest device that the default tiles are for, an Ampere of compute capability 8.6.
_SHARED_BYTES = 99 * 1024


class Tiles(NamedTuple):
    """A program's tokens, columns of the large factor's result, and depth of one step; warps, and loads in flight."""

    tokens: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class HeldTiles(NamedTuple):
    """Tokens that a program holds whole; warps, and loads in flight."""

    tokens: int
    num_warps: int
    num_stages: int


class TinyProduct(NamedTuple):
    """A product with one tiny factor, as ``matmul.py`` names its sizes."""

    terms: int
    tiny_out: int
    tiny_in: int
    large_out: int
    large_in: int
    right: bool

    @property
    def expands(self) -> bool:
        return self.tiny_out > self.tiny_in


@functools.cache
def tiny_product(product: Product) -> TinyProduct | None:
    """The product with its tiny factor apart; None where no factor is tiny, or neither much smaller than the other.

    A program takes as many rows of the large factor's product as the tiny one has rows or columns: from some five on,
    with factors it can hold whole, two chained products read x once and do less.
    """
    right = product.tiny_right
    if right is None:
        return None
    terms, m1, n1, m2, n2 = product
    apart = TinyProduct(terms, m2, n2, m1, n1, True) if right else TinyProduct(terms, m1, n1, m2, n2, False)
    return None if min(apart.tiny_out, apart.tiny_in) > 4 and chain_fits(product) else apart


def unsupported_reason(product: Product, dtype: torch.dtype) -> str | None:
    """Why no kernel takes a product of operands of a dtype; None where one does."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute float32, bfloat16 and float16, not {dtype}"
    if tiny_product(product) is None and not chain_fits(product):
        return (
            f"of {product} neither factor is tiny (at most {TINY} rows and columns), "
            "and a program cannot hold a token's grids"
        )
    return None


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is not below either."""
    return max(least, 1 << (size - 1).bit_length())


@tunable("matmul_kernel")
def matmul_tiles(
    product: TinyProduct, tokens: int, element: int, expand: bool, reduces: bool, exact: bool = False
) -> Tiles:
    """Tiles of ``matmul_kernel`` for a number of tokens (``token_bucket``) and bytes of an element.

    ``exact``: float32 without the tensor cores, whose operands all go through registers.
    """
    tiny_out, tiny_in, right = product.tiny_out, product.tiny_in, product.right
    rows = tiny_in if expand else tiny_out
    together = right or product.terms > 1  # results wait for each other: to be interleaved, or summed over terms

    def registers(block: int, columns: int, depth: int) -> float:
        """Of all threads: accumulators, tiles of x that pass through registers on their way to the product, results."""
        total = float(rows * block * columns)
        if not expand:
            total += (tiny_in * element / 4 + 1) * block * depth
        else:
            # Fitted to what compiles without spills: operands are under way in parts, results joined one by one.
            total += tiny_in * element / (8 if right else 16) * block * depth
            total += 64 * max(0, tiny_in * tiny_out - 16)  # the tiny factor itself, in every thread
            total += (tiny_out * (1.2 if product.terms > 1 else 0.75) if together else 1) * block * columns
            if reduces:
                total += (tiny_out * element / 4 if together else 1) * block * columns
        return total

    return _best_tiles(product, tokens, element, rows, registers, exact)


def _best_tiles(
    product: TinyProduct, tokens: int, element: int, rows: int, registers: Callable[[int, int, int], float],
    exact: bool,
) -> Tiles:  # fmt: skip
    """Of the tiles that fit, those that load the fewest values for a multiply-add, edges counted in."""
    most_columns = min(power_of_two(product.large_out), 256)
    most_depth = min(power_of_two(product.large_in), 16 if exact else 128 // element)
    most_registers = _EXACT_REGISTERS if exact else _REGISTERS
    best: tuple[tuple[float, ...], Tiles] | None = None
    for block, columns, depth, warps in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128, 256), (16, 32, 64), (4, 8)
    ):
        if columns > most_columns or depth > most_depth or block > power_of_two(tokens):
            continue
        if block * columns < 64 * warps:
            continue
        # Where none leaves enough free, those that come nearest.
        excess = max(1.0, registers(block, columns, depth) / (most_registers * 32 * warps))
        step = element * depth * (product.tiny_in * block + columns)
        stages = min(3, _SHARED_BYTES // step)
        if stages == 0:
            continue
        loads = (product.tiny_in * block + columns) / (rows * block * columns)
        edges = ceil_div(product.large_out, columns) * columns / product.large_out
        edges *= ceil_div(tokens, block) * block / tokens
        # A loop that waits for each of its loads, or that takes few of them at once, is slow; wgmma takes 64 rows.
        slow = (1.0 if stages > 1 else 2.0) * (1 + 8 / depth) * (1.0 if block >= 64 else 2.0)
        rank = (excess, loads * edges * slow, -depth, -warps)
        if best is None or rank < best[0]:
            best = rank, Tiles(block, columns, depth, warps, max(stages, 1))
    if best is None:
        raise AssertionError(f"no tiles fit {product}")  # every tiny factor fits the smallest
    return best[1]


@tunable("large_gradient_kernel")
def large_gradient_tiles(product: TinyProduct, tokens: int, element: int, exact: bool = False) -> Tiles:
    """Tiles of ``large_gradient_kernel``: here a step is a number of tokens, and depth the other dimension."""
    columns = min(power_of_two(product.large_out), 64 if exact else 128)
    depth = min(power_of_two(product.large_in), 64)
    tiles = product.tiny_out * columns + product.tiny_in * depth
    block = min(power_of_two(tokens), 16 if exact else 128 // element)
    while block > 16 and tiles * block * element * 2 > _SHARED_BYTES:
        block //= 2
    while columns > 16 and tiles * block * element > _SHARED_BYTES:
        columns, depth = columns // 2, max(16, depth // 2)
        tiles = product.tiny_out * columns + product.tiny_in * depth
    warps = 8 if columns * depth > 4096 else 4
    while exact and max(columns, depth) > 16 and columns * depth + tiles * block > _EXACT_REGISTERS * 32 * warps:
        if depth == 16 or (columns > 16 and product.tiny_out * columns > product.tiny_in * depth):
            columns //= 2
        else:
            depth //= 2
        tiles = product.tiny_out * columns + product.tiny_in * depth
    return Tiles(block, columns, depth, warps, 2 if tiles * block * element * 2 <= _SHARED_BYTES else 1)


def token_bucket(tokens: int) -> int:
    """The number of tokens that plans are made for: a few sizes, so that few kernels are compiled."""
    return min(power_of_two(tokens), 32768)


def splits(tokens: int, block: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many parts the tokens of a sum go, and tokens of each: enough programs to fill the device twice."""
    blocks = ceil_div(tokens, block)
    each = ceil_div(blocks, max(1, min(blocks, 2 * multiprocessors // programs)))
    return ceil_div(blocks, each), each * block


def padded(product: Product) -> tuple[int, int, int, int]:
    """m1, n1, m2, n2 as a program of ``balanced.py`` holds them."""
    return tuple(power_of_two(size) for size in product[1:])  # type: ignore[return-value]


def left_first(product: Product) -> bool:
    """Whether a program of ``chain_kernel`` multiplies by A first: whichever takes fewer multiply-adds as padded."""
    m1, n1, m2, n2 = padded(product)
    return m1 * n2 * (n1 + m2) < n1 * m2 * (n2 + m1)


def chain_fits(product: Product) -> bool:
    """Whether a program can hold one token's grids, with room to spare for operands on their way to the products."""
    m1, n1, m2, n2 = padded(product)
    grid = max(m1 * m2, n1 * n2, m1 * n2 if left_first(product) else n1 * m2)
    return max(m1, n1, m2, n2) <= 128 and grid <= 8192


@tunable("chain_kernel")
def chain_tiles(product: Product, tokens: int, element: int) -> HeldTiles:
    """Tiles of ``chain_kernel``."""
    m1, n1, m2, n2 = padded(product)
    held = m1 * m2 + n1 * n2 // 2 + (m1 * n2 if left_first(product) else n1 * m2)
    return _tokens_held(held, element)


@tunable("chain_gradient_kernel")
def chain_gradient_tiles(product: Product, tokens: int, element: int) -> HeldTiles:
    """Tiles of ``chain_gradient_kernel``: here a step is a number of tokens."""
    m1, n1, m2, n2 = padded(product)
    held = (m1 * m2 + n1 * n2 + m1 * n1 + m2 * n2) // 2 + 2 * n1 * m2
    return _tokens_held(held, element)


def _tokens_held(values: int, element: int) -> HeldTiles:
    tokens = 16
    while tokens > 1 and tokens * values * element // 2 > 80 * 32 * 4:
        tokens //= 2
    warps = 4
    while warps < 16 and tokens * values * element // 2 > 80 * 32 * warps * (2 if element == 2 else 1):
        warps *= 2
    return HeldTiles(tokens, warps, 2)
