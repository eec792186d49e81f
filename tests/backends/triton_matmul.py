"""A small matrix product in Triton, with its launcher: what the tests of compiling and of gates work on."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kron_kernels.backends.triton.launch import Options, launch


@triton.jit(do_not_specialize=["T"])
def matmul_kernel(x, w, y, T, N, scale, BT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """``y (T, BM) = scale x (T, N) w^T``, w ``(BM, N)``, N a multiple of BK; every tensor contiguous."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m = tl.arange(0, BM)
    total = tl.zeros((BT, BM), tl.float32)
    for k0 in range(0, N, BK):
        k = k0 + tl.arange(0, BK)
        rows = tl.load(x + t.to(tl.int64)[:, None] * N + k[None, :], mask=t[:, None] < T, other=0.0)
        weight = tl.load(w + m[:, None] * N + k[None, :])
        total = tl.dot(rows, tl.trans(weight), total)
    result = (total * scale).to(y.dtype.element_ty)
    tl.store(y + t.to(tl.int64)[:, None] * BM + m[None, :], result, mask=t[:, None] < T)


def matmul(x: Tensor, w: Tensor, tile: int = 64, warps: int = 4) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[0])
    grid = (triton.cdiv(x.shape[0], tile),)
    launch(matmul_kernel, grid, (x, w, y, *x.shape, 1.0), (tile, w.shape[0], 64), Options(warps, 3))
    return y
