"""kron_qkv: each projection is the product by itself."""

from __future__ import annotations

import pytest
import torch

from kron_kernels import kron_qkv
from kron_kernels.schemas import reference
from kron_kernels.testing import accuracy, shapes
from tests.ops.sampling import OPS, needs_extension, sampled


@needs_extension
@sampled([case for case in shapes.CASES if case.tokens], step=6)
def test_accuracy(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    """Three projections, and one more than the kernels take at a time."""
    operands = [shapes.make(case, dtype, seed) for seed in range(9 if case.shape == "odd" else 3)]
    x = operands[0].x
    a, b, biases = [o.a for o in operands], [o.b for o in operands], [o.bias for o in operands]
    for y, o in zip(OPS.kron_qkv(x, a, b, biases if case.bias else [], []), operands, strict=True):
        assert y.is_contiguous()
        alone = shapes.Operands(x, o.a, o.b, o.bias, o.grad)
        accuracy.assert_accurate(y, reference.kron_matmul(x, o.a, o.b, o.bias), accuracy.forward_oracle(alone))


def test_gradients_and_no_tokens() -> None:
    x, a, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 6), (1, 4, 2), (1, 3, 3)))
    torch.autograd.gradcheck(lambda x, a, b: kron_qkv(x, [a, -a], [b, 2 * b]), (x, a, b))
    with torch.no_grad():
        assert [y.shape for y in kron_qkv(x[:0], [a, a[0]], [b, b[0]])] == [(0, 12)] * 2


@pytest.mark.parametrize("backend", [None, "reference"])
def test_projections_of_several_shapes_in_matrices(backend: str | None) -> None:
    x = torch.randn(2, 3, 12)
    a, b = [torch.randn(4, 3), torch.randn(2, 6)], [torch.randn(5, 4), torch.randn(7, 2)]
    biases = [torch.randn(20), torch.randn(14)]
    for y, *factors in zip(kron_qkv(x, a, b, biases, backend=backend), a, b, biases, strict=True):
        dense = torch.nn.functional.linear(x, torch.kron(*factors[:2]), factors[2])
        torch.testing.assert_close(y, dense)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(y.dtype is torch.bfloat16 for y in kron_qkv(x, a, b, biases, backend=backend))
