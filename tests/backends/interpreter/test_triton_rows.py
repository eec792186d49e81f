"""Products with a pass over whole rows behind them, by the Triton kernels: add and norm, rounding to int8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels.backends.triton import rows
from kron_kernels.schemas import reference
from tests import cases
from tests.ops import block_cases

_CASES = [
    *(cases.Case(shape, 17) for shape in ("k8-attention-small", "k21-w2-small", "odd", "scalar", "row-a")),
    *(cases.Case("balanced", tokens) for tokens in (0, 1, 5)),
    *(cases.Case("odd", 33, terms) for terms in (2, 3)),
    *(cases.Case("odd-wide", 5, layout=layout) for layout in cases.LAYOUTS),
    cases.Case("balanced-expand", 2),
]
_DTYPES = (torch.float32, torch.float16)


def norm(operands: cases.Operands, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    o = operands
    return reference.kron_matmul_norm(o.x, o.a, o.b, o.bias, residual, weight, bias, block_cases.EPS)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_norm(case: cases.Case, dtype: torch.dtype) -> None:
    o = cases.make(case, dtype)
    vectors = block_cases.norm_operands(o.grad, dtype)
    y = rows.kron_matmul_norm(o.x, o.a, o.b, o.bias, *vectors, block_cases.EPS)
    oracle = norm(o.double(), *(vector.double() for vector in vectors))
    assert y.dtype is dtype
    cases.assert_accurate(y, norm(o, *vectors), oracle)


def apart(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


@pytest.mark.parametrize("layout", [apart, lambda t: F.pad(t, (3, 2))[..., 3:-2], lambda t: t.mT.contiguous().mT])
def test_norm_of_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    o = cases.make(cases.Case("odd", 6))
    residual, weight, bias = block_cases.norm_operands(o.grad, torch.float32)
    expected = rows.kron_matmul_norm(o.x, o.a, o.b, None, residual, weight, bias, 1e-5)
    y = rows.kron_matmul_norm(
        o.x.view(2, 3, -1), o.a, o.b, None, layout(residual).view(2, 3, -1), apart(weight), apart(bias), 1e-5
    )
    assert torch.equal(y.flatten(0, 1), expected)


def test_rows_that_no_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    o = cases.make(cases.Case("odd", 6))
    operands = (o.x, o.a, o.b, o.bias, *block_cases.norm_operands(o.grad, torch.float32), 1e-5)
    expected = rows.kron_matmul_norm(*operands), *rows.kron_mm_int8(*operands[:3])
    monkeypatch.setattr(rows, "LONGEST_ROW", 20)
    monkeypatch.setattr(rows, "launch", None)
    torch.testing.assert_close((rows.kron_matmul_norm(*operands), *rows.kron_mm_int8(*operands[:3])), expected)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_int8(case: cases.Case, dtype: torch.dtype) -> None:
    o = cases.make(case, dtype)
    oracle = cases.forward_oracle(cases.Operands(o.x, o.a, o.b, None, o.grad))
    cases.assert_rounded(*rows.kron_mm_int8(o.x, o.a, o.b), reference.kron_matmul(o.x, o.a, o.b), oracle)
    if case.terms == 1:
        for one, other in zip(rows.kron_mm_int8(o.x, o.a[0], o.b[0]), rows.kron_mm_int8(o.x, o.a, o.b), strict=True):
            assert torch.equal(one, other)


_NAN, _INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_bytes_are_those_of_the_reference(dtype: torch.dtype) -> None:
    """Ties, zeros, NaN, infinities and scales below the normal numbers."""
    tokens = [
        (127, 0.5, 1.5, -2.5, -0.5, 126, -127),
        (-127, 63.5, 64.5, -63.5, 3.5, 0, -1),
        (0, 0, -0.0, 0, 0, 0, 0),
        (1, 2, _NAN, 4, 0, 0, 0),
        (1, 2, -_INF, 4, 0, 0, 0),
        (1, _INF, _NAN, 4, 0, 0, 0),
        (-_NAN, 0, 0, 0, 0, 0, 0),
        *((1e-43, -3e-43, 2.49e-43, 0, 1e-44, 1e-45, 0), (2.49e-43, -2.49e-43, 0, 0, 1e-44, 1e-45, 0))
        * (dtype is torch.float32),
    ]
    y = torch.tensor(tokens, dtype=dtype)
    q, scale = torch.empty_like(y, dtype=torch.int8), torch.empty(len(tokens), 1)
    rows._launch_rows(rows.quantise_kernel, y, (y, q, scale, len(tokens)))
    expected_q, expected_scale = reference.quantize_tokens(y)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(q, expected_q)


def test_many_bytes_are_those_of_the_reference() -> None:
    y = torch.randn(40, 1000) * torch.logspace(-30, 30, 40)[:, None]
    q, scale = torch.empty_like(y, dtype=torch.int8), torch.empty(40, 1)
    rows._launch_rows(rows.quantise_kernel, y, (y, q, scale, 40))
    expected_q, expected_scale = reference.quantize_tokens(y)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q, expected_q)
