"""Several products of one input in one launch of a Triton kernel, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.backends.base import Device
from kron_kernels.backends.triton import implementations
from kron_kernels.backends.triton.launch import recording
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


SIZES = {"odd": ((3, 5), (7, 2)), "plain": ((20, 10), (1, 1)), "balanced": ((24, 24), (32, 32))}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shapes", "launches"),
    [
        (["odd"], ["matmul_kernel"]),
        (["odd"] * 4, ["projections_kernel"]),
        (["odd"] * 5, ["projections_kernel", "matmul_kernel"]),
        (["plain", "odd", "odd"], ["matmul_kernel", "projections_kernel"]),
        (["odd", "transposed"], ["matmul_kernel"] * 2),
        (["balanced"] * 3, ["chain_kernel"] * 3),
    ],
    ids=lambda value: "-".join(value),
)
def test_neighbours_of_one_shape_share_a_launch(shapes: list[str], launches: list[str]) -> None:
    def factor(shape: str, side: int) -> Tensor:
        value = torch.randn(1, *SIZES.get(shape, SIZES["odd"])[side])
        return value.mT.contiguous().mT if shape == "transposed" else value

    x = torch.randn(9, 768 if "balanced" in shapes else 10)
    a, b = ([factor(shape, side) for shape in shapes] for side in (0, 1))
    with recording(Device(80, 108, 166912)) as seen:
        kron_qkv(x, a, b, [], [])
    assert [launch.kernel.fn.__name__ for launch in seen] == launches
    for left, right, y in zip(a, b, kron_qkv(x, a, b, [], []), strict=True):
        torch.testing.assert_close(y, reference.kron_matmul(x, left, right), rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_parts_of_one_factor_of_different_sizes() -> None:
    """Fewer keys than queries, as slices of one factor: of equal strides, not of equal shape."""
    a, b, x = torch.randn(1, 12, 5), torch.randn(1, 7, 2), torch.randn(3, 3, 10)
    parts = [a[:, :6], a[:, 6:9], a[:, 9:]]
    for part, y in zip(parts, kron_qkv(x, parts, [b] * 3, [], []), strict=True):
        torch.testing.assert_close(y, reference.kron_matmul(x, part, b), rtol=1e-4, atol=1e-4)
