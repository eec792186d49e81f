"""Checks of what a caller passes in: every message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops import ACTIVATION_CODES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def activation_code(activation: str | None) -> int:
    """The op's code of an activation's name; ValueError for an unknown one."""
    code = ACTIVATION_CODES.get(activation)
    if code is None:
        choices = ", ".join(repr(name) for name in ACTIVATION_CODES)
        raise ValueError(f"activation: expected one of {choices}, got {activation!r}")
    return code


def check_types(x: Any, a: Any, b: Any, bias: Any) -> None:
    """Raise TypeError for what is no tensor."""
    if isinstance(x, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor):
        if bias is None or isinstance(bias, Tensor):
            return
        raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
    for name, operand in (("x", x), ("a", a), ("b", b)):
        if not isinstance(operand, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(operand).__name__}")


def check_operands(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Check ``x (..., n1 * n2)``, ``a (S, m1, n1)``, ``b (S, m2, n2)``, ``bias (m1 * m2,)`` against each other.

    Raises TypeError for dtypes, ValueError for shapes and devices.
    """
    if a.dim() != 3 or b.dim() != 3:
        _bad_factors(a, b)
    (terms, m1, n1), (b_terms, m2, n2) = a.shape, b.shape
    if terms != b_terms or terms * m1 * n1 * m2 * n2 == 0:
        _bad_factors(a, b)
    x_shape = x.shape
    if not x_shape or x_shape[-1] != n1 * n2:
        raise ValueError(f"x: expected last dimension n1 * n2 = {n1} * {n2} = {n1 * n2}, got shape {tuple(x_shape)}")
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        raise TypeError(f"x: expected dtype float32, float64, bfloat16 or float16, got {dtype}")
    if a.dtype is not dtype or b.dtype is not dtype or a.device != device or b.device != device:
        _match("a", a, x)
        _match("b", b, x)
    if bias is not None:
        if bias.shape != (m1 * m2,):
            raise ValueError(
                f"bias: expected shape (m1 * m2,) = ({m1} * {m2},) = ({m1 * m2},), got {tuple(bias.shape)}"
            )
        _match("bias", bias, x)


def _match(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")


def _bad_factors(a: Tensor, b: Tensor) -> None:
    for name, factor, letters in (("a", a, "(S, m1, n1)"), ("b", b, "(S, m2, n2)")):
        if factor.dim() != 3 or 0 in factor.shape:
            raise ValueError(
                f"{name}: expected a matrix or a stack of them, {letters}, with no empty dimension, "
                f"got shape {tuple(factor.shape)}"
            )
    raise ValueError(f"b: expected as many terms S as a, {a.shape[0]}, got {b.shape[0]} (shape {tuple(b.shape)})")
