"""Sums of the parts that programs leave behind, in a fixed order: the second stage of every reduction over tokens."""

from __future__ import annotations

from torch import Tensor

from .kernels.sums import sum_partials_kernel
from .launch import Options, launch
from .plan import ceil_div

_PARTS, _COLUMNS = 32, 128


def sum_partials(partial: Tensor, out: Tensor, transposed: bool = False) -> None:
    """``partial (P, ...)`` float32, summed over P, into the contiguous ``out (..., rows, columns)``.

    transposed: the matrices of ``partial`` are ``(columns, rows)``.
    """
    rows, columns = out.shape[-2:] if out.dim() > 1 else (1, out.numel())
    launch(
        sum_partials_kernel,
        (ceil_div(out.numel(), _COLUMNS),),
        (partial, out, partial.shape[0], out.numel()),
        (rows, columns, transposed, _PARTS, _COLUMNS),
        Options(4, 2),
    )
