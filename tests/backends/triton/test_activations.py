"""Activations of the Triton kernels and their derivatives, interpreted, against torch in fp64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kron_kernels.backends.triton.activations import activate, activate_with_gradient
from kron_kernels.schemas import reference

NAMES = (None, *reference.ACTIVATIONS)
# Largest error of the value and of the derivative, by type of the data.
BOUNDS = {tl.float32: (4e-7, 2e-6), tl.float16: (4e-5, 5e-5), tl.bfloat16: (2e-4, 4e-4)}


@triton.jit
def _apply(x, y, value, slope, N, CODE: tl.constexpr, dtype: tl.constexpr):
    at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    mask = at < N
    loaded = tl.load(x + at, mask=mask)
    tl.store(y + at, activate(loaded, CODE, dtype), mask=mask)
    one, other = activate_with_gradient(loaded, CODE, dtype)
    tl.store(value + at, one, mask=mask)
    tl.store(slope + at, other, mask=mask)


def apply(x: Tensor, name: str | None, dtype: object) -> tuple[Tensor, Tensor, Tensor]:
    y, value, slope = (torch.full_like(x, float("nan")) for _ in range(3))
    _apply[(triton.cdiv(x.numel(), 4096),)](x, y, value, slope, x.numel(), NAMES.index(name), dtype)
    return y, value, slope


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_below_what_results_are_rounded_to(name: str | None, dtype: object) -> None:
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-6, 4, 500), -torch.logspace(-6, 4, 500)])
    x[x == 0] = 1e-6  # where relu has no derivative
    exact = x.double().requires_grad_()
    expected = exact.clone() if name is None else reference.ACTIVATIONS[name](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    allowed_value, allowed_slope = BOUNDS[dtype]
    y, value, actual_slope = apply(x, name, dtype)
    # Where the result is as large as x, rounding that alone is an error of half a unit in its last place.
    scale = x.abs().double().clamp(min=1)
    assert max(((what.double() - expected).abs() / scale).max() for what in (y, value)) <= allowed_value
    assert (actual_slope.double() - slope).abs().max() <= allowed_slope
    special = torch.tensor([float("nan"), float("inf"), 1e30, -1e30])
    wanted = torch.cat([special[:3], special[3:] if name is None else torch.zeros(1)])
    for what in apply(special, name, dtype)[:2]:
        torch.testing.assert_close(what, wanted, equal_nan=True)
