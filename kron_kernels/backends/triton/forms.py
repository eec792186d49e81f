"""What Triton's kernels take, and their plans in words, for the choice of a backend and ``explain``. No Triton here."""

from __future__ import annotations

import torch

from ...schemas.product import Product
from ..devices import allows_tf32
from . import ffn_tiles, row_tiles, tiles
from .tiles import Device


def unsupported_reason(op: str, products: tuple[Product, ...], dtype: torch.dtype) -> str | None:
    """Why no kernel takes an op on operands of a dtype; None where one does."""
    if op.startswith("kron_embedding"):
        return row_tiles.embedding_unsupported_reason(products[0], dtype, gradient=op.endswith("backward"))
    return next((reason for product in products if (reason := tiles.unsupported_reason(product, dtype))), None)


def form(op: str, products: tuple[Product, ...], dtype: torch.dtype, tokens: int, device: Device) -> str:
    """How an op runs, of a gradient the op it is of; or why it does not."""
    reason = unsupported_reason(op, products, dtype)
    if reason:
        return reason
    if op.startswith("kron_embedding"):
        rows, _ = row_tiles.row_tiles(row_tiles.embedding_row(products[0]))
        return f"rows gathered, expanded and normed in one pass, {rows} token{'s' * (rows > 1)} a program"
    if op == "kron_ffn":
        return feed_forward(products[0], products[1], tokens, dtype, device)
    return "; then ".join(product(each, tokens, dtype.itemsize, device.arch) for each in products)


def product(problem: Product, tokens: int, element: int, arch: int | str) -> str:
    """How ``kron_matmul`` runs: which factor mixes and where, or both held; and the tiles."""
    apart = tiles.tiny_product(problem)
    if apart is None:
        block, warps, _ = tiles.chain_tiles(arch, problem, tiles.token_bucket(tokens), element)
        first = "left" if tiles.left_first(problem) else "right"
        return f"two chained products, the {first} factor first, {block} tokens a program of {warps} warps"
    exact = element == 4 and not allows_tf32()
    found = tiles.matmul_tiles(arch, apart, tiles.token_bucket(tokens), element, apart.expands, False, exact)
    rows = min(apart.tiny_in, apart.tiny_out)
    side = "right" if apart.right else "left"
    where = "storing" if apart.expands else "loading"
    return (
        f"one product of {rows} row{'s' * (rows > 1)} a token with the {apart.large_out}x{apart.large_in} factor, the "
        f"{apart.tiny_out}x{apart.tiny_in} factor on the {side} applied while {where}; tiles of {found.tokens} tokens "
        f"x {found.columns} columns x {found.depth}, {found.num_warps} warps, {found.num_stages} stages"
    )


def feed_forward(first: Product, second: Product, tokens: int, dtype: torch.dtype, device: Device) -> str:
    """How ``kron_ffn`` runs: as one kernel, as two that never hold its wide middle, or as two products."""
    other = ffn_tiles.fits(first, second, tokens, dtype, device)
    if other is None:
        sizes = ffn_tiles.Ffn(first.n1, first.m1, second.m1, first.n2, first.m2, second.m2)
        tiles = ffn_tiles.tiles_of(sizes, tokens, dtype, device)
        return (
            f"one kernel, the {first.m1 * first.m2} wide middle in registers; {tiles.tokens} tokens and "
            f"{tiles.columns} columns of the middle at a time, {tiles.num_warps} warps, {tiles.num_stages} stages"
        )
    if not other.startswith("two products"):
        return other
    return "; ".join([other, *(product(each, tokens, dtype.itemsize, device.arch) for each in (first, second))])
