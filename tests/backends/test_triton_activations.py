"""Activations of the Triton kernels and their derivatives, interpreted, against torch in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.schemas import reference
from kron_kernels.schemas.registry import ACTIVATION_CODES

pytest.importorskip("triton")

import triton
import triton.language as tl
from kron_kernels.backends.triton.kernels.primitives import activate, activate_with_gradient

from kron_kernels.backends.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here: the tests of the GPU run them")

# Largest error of the value and of the derivative, by type of the data; "relu" and none are exact.
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


def _run(x: Tensor, name: str | None, dtype: object) -> tuple[Tensor, Tensor, Tensor]:
    y, value, slope = (torch.full_like(x, float("nan")) for _ in range(3))
    _apply[(triton.cdiv(x.numel(), 4096),)](x, y, value, slope, x.numel(), ACTIVATION_CODES[name], dtype)
    return y, value, slope


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", [None, *reference.ACTIVATIONS])
def test_errors_are_below_what_results_are_rounded_to(name: str | None, dtype: object) -> None:
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-6, 4, 500), -torch.logspace(-6, 4, 500)])
    x[0] = 0.0
    exact = x.double().requires_grad_()
    expected = exact.clone() if name is None else reference.ACTIVATIONS[name](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    # Where the result is as large as x, rounding that alone is an error of half a unit in its last place.
    allowed_value, allowed_slope = BOUNDS[dtype]
    scale = x.abs().double().clamp(min=1)
    y, value, actual_slope = _run(x, name, dtype)
    for what in (y, value):
        assert ((what.double() - expected).abs() / scale).max() <= allowed_value
    at = x != 0 if name == "relu" else torch.ones_like(x, dtype=torch.bool)
    assert (actual_slope.double() - slope).abs()[at].max() <= allowed_slope


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", [None, *reference.ACTIVATIONS])
def test_nan_infinity_and_large_values(name: str | None, dtype: object) -> None:
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30])
    y, value, _ = _run(x, name, dtype)
    expected = torch.cat([x[:3], x[3:] if name is None else torch.zeros(1)])
    for what in (y, value):
        torch.testing.assert_close(what, expected, equal_nan=True)
