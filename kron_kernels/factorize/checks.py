"""Checks of the arguments of the factorisation: each raises one error that says what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A moment summed in fp32 over many tokens is symmetric and positive semi-definite only to this share of its scale.
MOMENT_TOLERANCE = 1e-5


def check_positive(name: str, value: int) -> None:
    """Check that ``value`` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")


def check_weight(weight: Tensor, shape: tuple[int, int] | None = None) -> None:
    """Check that ``weight`` is a finite floating-point matrix, of ``shape`` where one is given."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a non-empty matrix (m, n), got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point dtype, got {weight.dtype}")
    if shape is not None and tuple(weight.shape) != shape:
        raise ValueError(f"weight: expected shape {shape}, got {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight: expected finite values, got NaN or inf")


def check_a_shape(a_shape: Sequence[int], m: int, n: int) -> tuple[int, int]:
    """Check that ``a_shape`` is a pair (m1, n1) that divides (m, n), and return it as a tuple."""
    pair = tuple(a_shape)
    if len(pair) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in pair):
        raise TypeError(f"a_shape: expected two ints (m1, n1), got {a_shape!r}")
    if pair[0] < 1 or pair[1] < 1 or m % pair[0] or n % pair[1]:
        raise ValueError(f"a_shape: expected (m1, n1) that divides ({m}, {n}), got {pair}")
    return pair[0], pair[1]


def check_terms(terms: int, most: int) -> None:
    """Check that ``terms`` is an int between 1 and ``most``."""
    check_positive("terms", terms)
    if terms > most:
        raise ValueError(f"terms: expected at most min(m1*n1, m2*n2) = {most}, got {terms}")


def check_moment(moment: Tensor, n: int) -> None:
    """Check that ``moment`` is a finite, symmetric, positive semi-definite, non-zero floating-point (n, n) matrix."""
    if not isinstance(moment, Tensor) or not moment.is_floating_point():
        got = moment.dtype if isinstance(moment, Tensor) else type(moment).__name__
        raise TypeError(f"input_moment: expected a floating-point torch.Tensor, got {got}")
    if tuple(moment.shape) != (n, n):
        raise ValueError(f"input_moment: expected shape ({n}, {n}), got {tuple(moment.shape)}")
    if not torch.isfinite(moment).all():
        raise ValueError("input_moment: expected finite values, got NaN or inf")
    scale = moment.abs().max()
    skew = (moment - moment.T).abs().max()
    if skew > MOMENT_TOLERANCE * scale:
        raise ValueError(f"input_moment: expected a symmetric matrix, got entries that differ by {float(skew):.3g}")
    trace = float(moment.diagonal().double().sum())
    shifted = moment.double().clone()
    shifted.diagonal().add_(MOMENT_TOLERANCE * trace)
    if trace <= 0:
        raise ValueError(f"input_moment: expected a positive trace, got {trace:.3g}")
    if int(torch.linalg.cholesky_ex(shifted).info) != 0:
        raise ValueError("input_moment: expected a positive semi-definite matrix, got one with a negative eigenvalue")
