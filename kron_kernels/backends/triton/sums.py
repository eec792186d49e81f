"""Sums of the parts that programs leave behind, in a fixed order: the second stage of every reduction over tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Options, launch
from .tiles import ceil_div

_PARTS, _COLUMNS = 32, 128


@triton.jit(do_not_specialize=["P"])
def sum_partials_kernel(
    partial, out, P, J,
    ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """``out (J,)`` = the sum of ``partial (P, J)`` over P, in a fixed order; J is a stack of matrices ``(ROWS, COLS)``.

    TRANSPOSED: those of ``partial`` are ``(COLS, ROWS)``.
    """
    j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    source = j
    if TRANSPOSED:
        within = j % (ROWS * COLS)
        source = j - within + within % COLS * ROWS + within // COLS
    acc = tl.zeros([BP, BJ], dtype=tl.float32)
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        mask = (p[:, None] < P) & (j[None, :] < J)
        acc += tl.load(partial + p.to(tl.int64)[:, None] * J + source[None, :], mask=mask, other=0.0)
    tl.store(out + j, tl.sum(acc, 0).to(out.dtype.element_ty), mask=j < J)


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
