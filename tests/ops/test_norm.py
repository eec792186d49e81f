"""kron_matmul_norm: accuracy, gradients, AddNorm under autocast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels import AddNorm, kron_matmul_norm
from kron_kernels.schemas import reference
from kron_kernels.testing import accuracy, shapes
from tests.ops import block_cases
from tests.ops.sampling import OPS, needs_extension, sampled

# A norm of one or two values is a sign: it has no error to judge.
CASES = [case for case in shapes.CASES if case.shape != "scalar"]


@needs_extension
@sampled(CASES, step=5)
def test_accuracy(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    o = shapes.make(case, dtype)
    norm = block_cases.norm_operands(o.grad, dtype)
    operands = (o.x, o.a, o.b, o.bias, *norm)
    oracle = reference.kron_matmul_norm(*(None if t is None else t.double() for t in operands), block_cases.EPS)
    y = OPS.kron_matmul_norm(*operands, block_cases.EPS)
    assert y.dtype is dtype
    accuracy.assert_accurate(y, reference.kron_matmul_norm(*operands, block_cases.EPS), oracle)


def small() -> tuple[Tensor, ...]:
    sizes = ((2, 6), (1, 4, 2), (1, 3, 3), (12,), (2, 12), (12,), (12,))
    return tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)


def test_gradients() -> None:
    torch.autograd.gradcheck(lambda *t: kron_matmul_norm(*t[:4], AddNorm(*t[4:], 1e-3)), small())


def test_is_the_norm_of_the_dense_linear() -> None:
    x, a, b, bias, residual, weight, shift = (tensor.detach() for tensor in small())
    norm = AddNorm(residual, weight, shift, 1e-3)
    expected = F.layer_norm(residual + F.linear(x, reference.kron_weight(a, b), bias), (12,), weight, shift, 1e-3)
    for backend in (None, "reference"):
        torch.testing.assert_close(kron_matmul_norm(x, a, b, bias, norm, backend=backend), expected)
        torch.testing.assert_close(kron_matmul_norm(x, a[0], b[0], bias, norm, backend=backend), expected)
    torch.testing.assert_close(
        torch.vmap(lambda x, r: kron_matmul_norm(x, a, b, bias, norm._replace(residual=r)))(x, residual), expected
    )


def test_autocast_mixes_dtypes_as_torch_does() -> None:
    x, a, b, bias, *norm = (tensor.detach().float() for tensor in small())
    with torch.autocast("cpu", torch.bfloat16):
        y = kron_matmul_norm(x, a, b, bias, AddNorm(*norm))
        dense = F.layer_norm(norm[0] + F.linear(x, reference.kron_weight(a, b), bias), (12,), *norm[1:], 1e-12)
    assert y.dtype is dense.dtype
    torch.testing.assert_close(y, dense, rtol=0.05, atol=0.05)
