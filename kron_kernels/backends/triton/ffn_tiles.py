"""How a feed-forward block runs, and its tiles: pure functions of sizes. No Triton here."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ...schemas.product import Product
from .tiles import Device, Tiles, ceil_div, power_of_two, token_bucket
from .tuned import tunable

# Values of a token that the kernels unroll over: columns of A1, rows of A2; and rows of A1.
_MOST_GRID, _MOST_MIDDLE = 4, 32
# Accumulators of one thread that outputs may take (of its 255 registers, what the middle of the block leaves), and
# values of the tiny factors that it can keep beside so many.
_MOST_OUTPUTS, _MOST_MIX = 192, 32


class Ffn(NamedTuple):
    """Sizes of a block as ``ffn.py`` names them: A1 (M, C), B1 (P, K), A2 (Q, M), B2 (N, P)."""

    c: int
    m: int
    q: int
    k: int
    p: int
    n: int


class FfnForm(NamedTuple):
    """One kernel, or 2 that hand over z."""

    kernels: int


class FfnTiles(NamedTuple):
    """A program's tokens, and columns of the middle at a time; warps, loads in flight."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int


@functools.cache
def chained(first: Product, second: Product) -> Ffn | str:
    """The block without its wide middle; or, in words, why it has to run as two products."""
    if first.terms != 1 or second.terms != 1:
        return f"two products: only single pairs chain, and these are sums of {first.terms} and {second.terms}"
    if (first.m1, first.m2) != (second.n1, second.n2):
        given, taken = f"{first.m1}x{first.m2}", f"{second.n1}x{second.n2}"
        return f"two products: the first pair gives a grid of {given}, the second takes one of {taken}"
    if max(first.n1, second.m1) > _MOST_GRID or first.m1 > _MOST_MIDDLE:
        tiny = f"{first.m1}x{first.n1} and {second.m1}x{second.n1}"
        return (
            f"two products: left factors of {tiny} are too large to be fused (at most {_MOST_MIDDLE} rows of the "
            f"first, {_MOST_GRID} columns, {_MOST_GRID} rows of the second)"
        )
    return Ffn(first.n1, first.m1, second.m1, first.n2, first.m2, second.m2)


def fits(first: Product, second: Product, tokens: int, dtype: torch.dtype, device: Device) -> str | None:
    """None where the block runs as one kernel; otherwise as what it runs, and why."""
    ffn = chained(first, second)
    if isinstance(ffn, str):
        return ffn
    if is_one_kernel(ffn, tokens, dtype, device):
        return None
    narrow = "two kernels that hand over the narrow middle"
    if _held(ffn, *_flags(dtype, device)) is None:
        return f"{narrow}: a program cannot hold input, outputs and tiny factors of enough tokens"
    return f"{narrow}: measured to be faster"


def is_one_kernel(ffn: Ffn, tokens: int, dtype: torch.dtype, device: Device) -> bool:
    return ffn_form(device.arch, ffn, token_bucket(tokens), *_flags(dtype, device)).kernels == 1


def tiles_of(ffn: Ffn, tokens: int, dtype: torch.dtype, device: Device) -> FfnTiles:
    return ffn_tiles(device.arch, ffn, token_bucket(tokens), *_flags(dtype, device))


def _flags(dtype: torch.dtype, device: Device) -> tuple[int, int, bool]:
    return dtype.itemsize, device.shared // 1024, dtype is torch.float16


def norm_is_fused(ffn: Ffn, tiles: FfnTiles, dtype: torch.dtype, device: Device) -> bool:
    """Whether the one kernel norms too: a program's tiles of outputs are whole tokens, and registers suffice.

    From sm_100 on, where accumulators are not in registers, and with 64 tokens of float16, some would spill.
    """
    whole = ffn.q == pair(ffn.q) and ffn.n % held_block(ffn.n) == 0
    newer = isinstance(device.arch, int) and device.arch >= 100
    return whole and not newer and not (dtype is torch.float16 and tiles.tokens > 32)


@tunable("ffn_form")
def ffn_form(ffn: Ffn, tokens: int, element: int, kilobytes: int, float16: bool) -> FfnForm:
    """On a device with so much shared memory a program."""
    return FfnForm(2 if _held(ffn, element, kilobytes, float16) is None else 1)


@tunable("ffn_forward_kernel")
def ffn_tiles(ffn: Ffn, tokens: int, element: int, kilobytes: int, float16: bool) -> FfnTiles:
    """Tiles of ``ffn_forward_kernel``."""
    return _held(ffn, element, kilobytes, float16) or FfnTiles(16, 16, 4, 1)


def _held(ffn: Ffn, element: int, kilobytes: int, float16: bool) -> FfnTiles | None:
    """As many tokens as registers and shared memory hold, 64 at most; None where not even 16 would do.

    With float32 B1 and B2 would pass by for too few tokens. Beside the outputs of 64 tokens the activation of float16,
    which has longer polynomials, leaves registers for 16 columns.
    """
    if element > 2 or ffn.m * (ffn.c + ffn.q) > _MOST_MIX:
        return None
    depth, block = held_block(ffn.k), held_block(ffn.n)
    k, n = ceil_div(ffn.k, depth) * depth, ceil_div(ffn.n, block) * block
    values = ceil_div(ffn.q, pair(ffn.q)) * pair(ffn.q)
    for tokens, columns in ((64, 32), (64, 16), (32, 32), (32, 16), (16, 32), (16, 16)):
        if float16 and (tokens, columns) == (64, 32):
            continue
        warps = 8 if tokens >= 32 else 4
        shared = element * (ffn.c * k * tokens + 2 * columns * (k + n)) + 4096
        if values * n * tokens <= _MOST_OUTPUTS * 32 * warps and shared <= kilobytes * 1024:
            return FfnTiles(tokens, columns, warps, 2)
    return None


@tunable("ffn_middle_kernel")
def z_tiles(ffn: Ffn, tokens: int, element: int) -> Tiles:
    """Tiles of ``ffn_middle_kernel``: few enough values that several programs of a multiprocessor take turns."""
    block = 64 if element == 2 else 32
    depth, columns = min(power_of_two(ffn.k), block), min(power_of_two(ffn.p), block)
    return Tiles(min(power_of_two(tokens), 128 // element), columns, depth, 8 if element == 2 else 4, 3)


@tunable("ffn_rows_kernel")
def row_tiles(ffn: Ffn, tokens: int, element: int) -> Tiles:
    """Tiles of ``ffn_rows_kernel``, whose rows are tokens times q."""
    depth = min(power_of_two(ffn.p), 64 if element == 2 else 32)
    columns = min(power_of_two(ffn.n), 128)
    rows = min(power_of_two(ffn.q * tokens), 128)
    return Tiles(rows, columns, depth, 8 if rows * columns > 4096 else 4, 3)


@tunable("ffn_backward_kernel")
def middle_tiles(ffn: Ffn, tokens: int, element: int) -> FfnTiles:
    """Two values a thread: beside its sums, of which there are ``m (c + q + 2)`` then, more would not fit."""
    return FfnTiles(4, 64, 4, 2)


def held_block(size: int) -> int:
    """The power of two, 128 at most, in blocks of which a dimension is held with the fewest values beyond its edge."""
    return min((128, 64, 32, 16), key=lambda block: (ceil_div(size, block) * block, -block))


def pair(size: int) -> int:
    """How many values of a token go into the rows of one tile."""
    return 2 if size > 1 else 1
