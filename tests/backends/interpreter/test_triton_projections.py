"""Several products of one input in one launch of a Triton kernel, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.backends.triton import projections
from kron_kernels.backends.triton.launch import Device, recording
from tests import cases

_CASES = [
    *(cases.Case(shape, 17) for shape in ("k8-attention-small", "k21-attention-small", "k8-w1-small", "k8-w2-small")),
    *(cases.Case(shape, 17) for shape in ("odd", "balanced", "row-b", "column-a")),
    *(cases.Case("odd", 33, terms, bias=False) for terms in (2, 3)),
    *(cases.Case("k21-attention-small", 5, layout=layout) for layout in cases.LAYOUTS),
    *(cases.Case("k8-attention-small", tokens, bias=False) for tokens in (0, 1, 100)),
    cases.Case("k21-attention", 70),
]


def three(case: cases.Case, dtype: torch.dtype = torch.float32) -> list[cases.Operands]:
    """Operands of one x and three pairs of factors."""
    every = [cases.make(case, dtype, seed) for seed in range(3)]
    return [cases.Operands(every[0].x, o.a, o.b, o.bias, o.grad) for o in every]


def project(every: list[cases.Operands]) -> list[torch.Tensor]:
    biases = [o.bias for o in every if o.bias is not None]
    return projections.kron_qkv(every[0].x, [o.a for o in every], [o.b for o in every], biases, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_accuracy(case: cases.Case, dtype: torch.dtype) -> None:
    every = three(case, dtype)
    for o, y in zip(every, project(every), strict=True):
        same_dtype = cases.reference.kron_matmul(o.x, o.a, o.b, o.bias)
        assert y.is_contiguous()
        cases.assert_accurate(y, same_dtype, cases.forward_oracle(o))


@pytest.mark.parametrize(
    ("shapes", "launches"),
    [
        (["odd"] * 1, ["mm_kernel"]),
        (["odd"] * 2, ["projections_kernel"]),
        (["odd"] * 4, ["projections_kernel"]),
        (["odd"] * 5, ["projections_kernel", "mm_kernel"]),
        (["odd"] * 6, ["projections_kernel"] * 2),
        (["plain", "odd", "odd"], ["mm_kernel", "projections_kernel"]),
        (["odd", "plain", "odd"], ["mm_kernel"] * 3),
        (["odd", "transposed"], ["mm_kernel"] * 2),
        (["balanced"] * 3, ["chain_kernel"] * 3),
    ],
)
def test_neighbours_of_one_shape_share_a_launch(shapes: list[str], launches: list[str]) -> None:
    x = torch.randn(9, 768 if "balanced" in shapes else 10)
    sizes = {"odd": ((3, 5), (7, 2)), "plain": ((20, 10), (1, 1)), "balanced": ((24, 24), (32, 32))}
    a, b = (
        [
            torch.randn(1, *sizes.get(shape, sizes["odd"])[side]).mT.contiguous().mT
            if shape == "transposed"
            else torch.randn(1, *sizes[shape][side])
            for shape in shapes
        ]
        for side in (0, 1)
    )
    bias = [torch.randn(left.shape[1] * right.shape[1]) for left, right in zip(a, b, strict=True)]
    with recording(Device(80, 108, 166912)) as seen:
        projections.kron_qkv(x, a, b, bias, [])
    assert [launch.kernel.fn.__name__ for launch in seen] == launches
    results = projections.kron_qkv(x, a, b, bias, [])
    for left, right, vector, y in zip(a, b, bias, results, strict=True):
        torch.testing.assert_close(y, cases.reference.kron_matmul(x, left, right, vector), rtol=1e-4, atol=1e-4)


def test_leading_dimensions() -> None:
    every = three(cases.Case("k8-attention-small", 12))
    flat = project(every)
    x = every[0].x.view(3, 4, -1)
    for one, other in zip(
        projections.kron_qkv(x, [o.a for o in every], [o.b for o in every], [o.bias for o in every], []),
        flat,
        strict=True,
    ):
        assert torch.equal(one.flatten(0, 1), other)


def test_parts_of_one_tensor_of_different_sizes() -> None:
    """Fewer keys than queries, as slices of one factor: of equal strides, not of equal shape."""
    a, b, x = torch.randn(1, 12, 5), torch.randn(1, 7, 2), torch.randn(9, 10)
    parts = [a[:, :6], a[:, 6:9], a[:, 9:]]
    for part, y in zip(parts, projections.kron_qkv(x, parts, [b] * 3, [], []), strict=True):
        torch.testing.assert_close(y, cases.reference.kron_matmul(x, part, b), rtol=1e-4, atol=1e-4)
