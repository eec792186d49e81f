"""Operands as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import allows_tf32


def rows(tensor: Tensor) -> Tensor:
    """``(..., n)`` as ``(T, n)`` with its last dimension contiguous; a copy only where that needs one."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def precision(x: Tensor) -> str:
    """How float32 operands go through the tensor cores: as torch's setting for its own products says."""
    return "tf32" if allows_tf32() else "ieee"


def is_exact(x: Tensor) -> bool:
    """Whether products are of float32 operands as they are: without the tensor cores."""
    return x.dtype is torch.float32 and precision(x) == "ieee"
