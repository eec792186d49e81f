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
    expected = rows.kron_matmul_norm(*operands)
    monkeypatch.setattr(rows, "LONGEST_ROW", 20)
    monkeypatch.setattr(rows, "launch", None)
    torch.testing.assert_close(rows.kron_matmul_norm(*operands), expected)
