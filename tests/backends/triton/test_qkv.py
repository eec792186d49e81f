"""Several products of one input in one launch of a Triton kernel, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.backends.triton import implementations
from kron_kernels.schemas import reference
from kron_kernels.testing.accuracy import assert_accurate, forward_oracle
from kron_kernels.testing.shapes import LAYOUTS, Case, Operands, make

kron_qkv = implementations()["kron_qkv"]
SAMPLE = (
    *(Case(shape, 17) for shape in ("k8-attention-small", "k8-w1-small", "odd", "balanced", "row-b")),
    *(Case("k21-attention-small", 5, layout=layout) for layout in LAYOUTS[1:]),
    *(Case("odd", 33, 3, bias=False), Case("k8-attention-small", 0), Case("k8-attention-small", 100, bias=False)),
)


def check(case: Case, dtype: torch.dtype) -> None:
    every = [make(case, dtype, seed) for seed in range(3)]
    x = every[0].x
    biases = [o.bias for o in every if o.bias is not None]
    for o, y in zip(every, kron_qkv(x, [o.a for o in every], [o.b for o in every], biases, []), strict=True):
        assert_accurate(
            y, reference.kron_matmul(x, o.a, o.b, o.bias), forward_oracle(Operands(x, o.a, o.b, o.bias, o.grad))
        )


@pytest.mark.quick
def test_smoke() -> None:
    check(Case("odd", 5), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.id)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.quick
def test_parts_of_one_factor_of_different_sizes() -> None:
    """Fewer keys than queries, as slices of one factor: of equal strides, not of equal shape."""
    a, b, x = torch.randn(1, 12, 5), torch.randn(1, 7, 2), torch.randn(3, 3, 10)
    parts = [a[:, :6], a[:, 6:9], a[:, 9:]]
    for part, y in zip(parts, kron_qkv(x, parts, [b] * 3, [], []), strict=True):
        torch.testing.assert_close(y, reference.kron_matmul(x, part, b), rtol=1e-4, atol=1e-4)
