"""What kernels take of operations on whole rows, and how many a program holds. Like ``tiles.py``, plain Python."""

from __future__ import annotations

import itertools

import torch

from ...schemas.product import Product
from .tiles import power_of_two

# The longest row that a program holds.
LONGEST_ROW = 16384
# A table of so few rows is summed in the embedding's kernel: each of them is the sum of half of all tokens.
FEW_ROWS = 2


def row_tiles(row: int) -> tuple[int, int]:
    """Rows of so many values that a program holds, and its warps: 16 values a thread, 32 in the longest rows."""
    tokens = max(1, min(16, 4096 // row))
    return tokens, max(1, min(16, tokens * row // 512))


def embedding_row(product: Product) -> int:
    """Values of an embedding's row as a program holds it: p and k padded to powers of two."""
    return power_of_two(product.n1, 1) * power_of_two(product.n2, 1)


def embedding_gradient_tiles(product: Product, types: int) -> tuple[int, int] | None:
    """Tokens of a step of ``embedding_backward_kernel`` and its warps; None where a program cannot hold its sums.

    Beside the tiles it works on, a thread holds one for each sum over tokens: terms of b, rows of the types' table, the
    norm's two.
    """
    row = embedding_row(product)
    for each, warps in itertools.product((8, 4, 2, 1), (4, 8, 16)):
        registers = 40 + each * (7 + types + product.terms)
        tokens = each * 32 * warps // row
        # Two tokens share the wait for the sums of a row, unless that takes too many warps.
        if registers <= min(250, 2048 // warps) and tokens >= (2 if each == 8 and warps < 16 else 1):
            return min(tokens, 16), warps
    return None


def embedding_unsupported_reason(product: Product, dtype: torch.dtype, gradient: bool) -> str | None:
    """Why no kernel takes an embedding of factors ``(S, V, p)`` and ``(S, 1, k)``, or its gradient."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute float32, bfloat16 and float16, not {dtype}"
    size = f"rows of {product.n1} * {product.n2} values"
    if embedding_row(product) > LONGEST_ROW:
        return f"a program cannot hold {size}"
    if gradient and embedding_gradient_tiles(product, FEW_ROWS) is None:
        return f"a program cannot hold the sums of {product.terms} terms for {size}"
    return None
