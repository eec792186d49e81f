"""Launchers of products with a pass over whole rows of the result behind them (``kernels/rows.py``)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .kernels.rows import add_norm_kernel
from .launch import Options, launch
from .mm import run_product
from .operands import rows
from .plan import ceil_div, power_of_two
from .row_plan import LONGEST_ROW, row_tiles


def kron_matmul_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    packed: Tensor | None = None,
) -> Tensor:
    """The op ``kron_matmul_norm``; ``packed`` is of the CPU. Longer rows than a program holds are normed by torch."""
    size = a.shape[1] * b.shape[1]
    y = x.new_empty(*x.shape[:-1], size)
    run_product(x, a, b, y, bias)
    return add_norm(y, residual, norm_weight, norm_bias, eps)


def add_norm(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``layer_norm(residual + y)`` of a contiguous ``y (..., M)`` of the caller's own: in place where it can be."""
    size = y.shape[-1]
    if size > LONGEST_ROW:
        return F.layer_norm(residual + y, (size,), weight, bias, eps)
    if y.numel() > 0:
        residual = rows(residual)
        arguments = (y, residual, weight.contiguous(), bias.contiguous(), y.numel() // size, residual.stride(0), eps)
        _launch_rows(add_norm_kernel, y, arguments)
    return y


def _launch_rows(kernel: object, y: Tensor, arguments: tuple[object, ...]) -> None:
    """One program for each few rows of ``y (..., M)``."""
    size = y.shape[-1]
    padded = power_of_two(size, 1)
    tokens, warps = row_tiles(padded)
    launch(kernel, (ceil_div(y.numel() // size, tokens),), arguments, (size, padded, tokens), Options(warps, 1))
