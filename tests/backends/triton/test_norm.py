"""Add and norm behind a product by the Triton kernels, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels.backends.triton import implementations, norm
from kron_kernels.schemas import reference
from kron_kernels.testing.accuracy import assert_accurate
from kron_kernels.testing.shapes import Case, make
from tests.ops import block_cases

kron_matmul_norm = implementations()["kron_matmul_norm"]
SAMPLE = (
    *(Case(shape, 17) for shape in ("k8-attention-small", "k21-w2-small", "row-a")),
    *(Case("odd", 33, 2), Case("odd-wide", 5, layout="strided-rows"), Case("balanced", 1), Case("scalar", 3)),
)


def check(case: Case, dtype: torch.dtype) -> None:
    o = make(case, dtype)
    operands = (o.x, o.a, o.b, o.bias, *block_cases.norm_operands(o.grad, dtype))
    same_dtype = reference.kron_matmul_norm(*operands, 1e-5)
    oracle = reference.kron_matmul_norm(*(tensor.double() for tensor in operands), 1e-5)
    assert_accurate(kron_matmul_norm(*operands, 1e-5), same_dtype, oracle)


@pytest.mark.quick
def test_smoke() -> None:
    check(Case("odd", 5), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.id)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


def apart(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


@pytest.mark.parametrize("layout", [apart, lambda t: F.pad(t, (3, 2))[..., 3:-2], lambda t: t.mT.contiguous().mT])
def test_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    o = make(Case("odd", 6))
    residual, weight, bias = block_cases.norm_operands(o.grad, torch.float32)
    expected = kron_matmul_norm(o.x, o.a, o.b, None, residual, weight, bias, 1e-5)
    grid = o.x.view(2, 3, -1)
    strided = (layout(residual).view(2, 3, -1), apart(weight), apart(bias))
    assert torch.equal(kron_matmul_norm(grid, o.a, o.b, None, *strided, 1e-5).flatten(0, 1), expected)


def test_rows_that_no_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "LONGEST_ROW", 20)
    monkeypatch.setattr(norm, "launch", None)
    check(Case("odd", 6), torch.float32)
