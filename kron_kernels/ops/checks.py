"""Checks of what a caller passes in: every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..schemas.registry import ACTIVATION_CODES

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


def _match(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of {x_name}, {x.device}, got {tensor.device}")
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{name}: expected the dtype of {x_name}, {x.dtype}, got {tensor.dtype}")


def _bad_factors(a: Tensor, b: Tensor) -> None:
    for name, factor, letters in (("a", a, "(S, m1, n1)"), ("b", b, "(S, m2, n2)")):
        if factor.dim() != 3 or 0 in factor.shape:
            raise ValueError(
                f"{name}: expected a matrix or a stack of them, {letters}, with no empty dimension, "
                f"got shape {tuple(factor.shape)}"
            )
    raise ValueError(f"b: expected as many terms S as a, {a.shape[0]}, got {b.shape[0]} (shape {tuple(b.shape)})")


def check_base(base: Any, x: Tensor, m: int) -> None:
    """Check what a product ``(..., m)`` of ``x`` is added to."""
    if not isinstance(base, Tensor):
        raise TypeError(f"base: expected a Tensor, got {type(base).__name__}")
    shape = (*x.shape[:-1], m)
    if base.shape != shape:
        raise ValueError(f"base: expected the shape of the product, {tuple(shape)}, got {tuple(base.shape)}")
    _match("base", base, x)


def check_alpha(alpha: Any) -> None:
    """Raise TypeError for what is no number: of a tensor the ops would take the value, and give it no gradient."""
    if not isinstance(alpha, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"alpha: expected a number, got {type(alpha).__name__} (a factor takes a learned scale)")


def check_frozen(name: str, tensor: Any, shape: tuple[int, ...], x: Tensor) -> None:
    """Check a weight or bias of a frozen layer of ``x``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a frozen tensor, got one that requires gradients")
    _match(name, tensor, x)


def check_low_rank_types(b: Any) -> tuple[Any, Tensor | None]:
    """The two tensors of a right factor ``(p, q)``; of what is no pair, itself and None."""
    if not isinstance(b, tuple):
        return b, None
    if len(b) != 2 or not all(isinstance(part, Tensor) for part in b):
        got = ", ".join(type(part).__name__ for part in b)
        raise TypeError(f"b: expected a Tensor or a pair (p, q) of Tensors, got ({got})")
    return b[0], b[1]


def check_low_rank(a: Tensor, p: Tensor, q: Tensor) -> None:
    """Check ``p (1, m2, r)`` and ``q (r, n2)`` against each other, and that ``a`` has one term."""
    if p.dim() != 3 or p.shape[0] != 1 or q.dim() != 2 or p.shape[2] != q.shape[0] or 0 in (*p.shape, *q.shape):
        raise ValueError(
            "b: expected matrices (m2, r) and (r, n2) with no empty dimension, got shapes "
            f"{tuple(p.shape[1:] if p.shape[0] == 1 else p.shape)} and {tuple(q.shape)}"
        )
    if a.dim() != 3 or a.shape[0] != 1:
        raise ValueError(f"a: expected one matrix (m1, n1) beside a low-rank b, got shape {tuple(a.shape)}")
    _match("b[0]", p, q, "b[1]")


def check_projections(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor | None]) -> None:
    """``check_operands`` of every projection of ``x``."""
    for left, right, one_bias in zip(a, b, bias, strict=True):
        check_operands(x, left, right, one_bias)


def check_ffn(
    x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor | None, a2: Tensor, b2: Tensor, bias2: Tensor | None
) -> None:
    """Check both pairs of a feed-forward block, and that the second takes what the first gives."""
    check_projections(x, [a1], [b1], [bias1])
    if a2.dim() != 3 or b2.dim() != 3:
        _bad_factors(a2, b2)
    middle, taken = a1.shape[1] * b1.shape[1], a2.shape[2] * b2.shape[2]
    if middle != taken:
        raise ValueError(
            f"a2, b2: expected n1 * n2 = {middle}, what the first pair gives, got shapes {tuple(a2.shape)} and "
            f"{tuple(b2.shape)} with n1 * n2 = {taken}"
        )
    # Shape, dtype and device of the intermediate, without its data.
    check_operands(x.new_empty((0, middle)), a2, b2, bias2)


def check_norm_types(norm: tuple[Any, Any, Any, float]) -> None:
    """Raise TypeError for a residual, weight or bias that is no tensor."""
    for name, tensor in zip(("norm.residual", "norm.weight", "norm.bias"), norm, strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")


def check_norm(x: Tensor, m: int, norm: tuple[Tensor, Tensor, Tensor, float], dtypes: bool = True) -> None:
    """Check a residual ``(..., m)`` and a layer norm's weight and bias ``(m,)`` against the product of ``x``."""
    residual, weight, bias, eps = norm
    shape = (*x.shape[:-1], m)
    for name, tensor, expected in (
        ("norm.residual", residual, shape),
        ("norm.weight", weight, (m,)),
        ("norm.bias", bias, (m,)),
    ):
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")
        if dtypes:
            _match(name, tensor, x)
    if not eps >= 0:
        raise ValueError(f"norm.eps: expected a number of at least 0, got {eps!r}")


def check_embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    """Check the operands of an embedding against each other; the indices' values are the op's to check."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or 0 in a.shape or 0 in b.shape:
        _bad_factors(a, b)
    if b.shape[1] != 1:
        raise ValueError(f"b: expected row vectors (S, 1, k), got shape {tuple(b.shape)}")
    if a.dtype not in DTYPES:
        raise TypeError(f"a: expected dtype float32, float64, bfloat16 or float16, got {a.dtype}")
    _match("b", b, a, "a")
    m = a.shape[2] * b.shape[2]
    check_indices("ids", ids, ids.shape, a)
    for name, index, table in (("position", position_ids, position_weight), ("type", type_ids, type_weight)):
        if (index is None) != (table is None):
            given, missing = ("weight", "ids") if index is None else ("ids", "weight")
            raise ValueError(f"{name}_{missing}: expected a Tensor along with {name}_{given}, got None")
        if index is None or table is None:
            continue
        check_indices(f"{name}_ids", index, ids.shape, a)
        if table.dim() != 2 or table.shape[1] != m:
            raise ValueError(f"{name}_weight: expected shape (rows, {m}), got {tuple(table.shape)}")
        _match(f"{name}_weight", table, a, "a")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_bias: expected both norm_weight and norm_bias or neither")
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            if vector.shape != (m,):
                raise ValueError(f"{name}: expected shape ({m},), got {tuple(vector.shape)}")
            _match(name, vector, a, "a")


def check_indices(name: str, index: Tensor, shape: tuple[int, ...], a: Tensor) -> None:
    """Check dtype, device and shape of indices that broadcast to ``shape``."""
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected dtype int64 or int32, got {index.dtype}")
    if index.device != a.device:
        raise ValueError(f"{name}: expected the device of a, {a.device}, got {index.device}")
    fits = index.dim() <= len(shape) and all(
        size in (1, full) for size, full in zip(reversed(index.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to that of ids, {tuple(shape)}, got {tuple(index.shape)}"
        )
