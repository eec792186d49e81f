"""Products and their gradients by the Triton kernels against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.backends.base import Device
from kron_kernels.backends.triton import implementations, tiles
from kron_kernels.backends.triton.launch import recording
from kron_kernels.schemas import reference
from kron_kernels.schemas.product import Product
from kron_kernels.testing.accuracy import assert_accurate, backward_case, forward_case
from kron_kernels.testing.shapes import CASES, LAYOUTS, Case, make

OPS = implementations()
HALVES = (torch.float32, torch.float16)
# Each form of the kernels: contracting and expanding on either side, several terms, no tiny factor; ragged tokens.
SAMPLE = (
    *(Case(shape, 17) for shape in ("k8-attention-small", "k8-w1-small", "k8-w2-small", "k21-attention-small")),
    *(Case(shape, 5, 2) for shape in ("odd", "row-b", "column-a", "balanced")),
    *(Case("k21-attention-small", 17, 2, layout) for layout in LAYOUTS[1:]),
    Case("balanced-expand", 5),
    Case("balanced-contract", 5, layout="strided-rows"),
    Case("k8-w1-small", 100, bias=False),
    Case("k8-w2-small", 33, 3, bias=False),
    Case("scalar", 1),
    Case("k8-attention", 5),
)
NAMES = ("dx", "da", "db", "dbias")


@pytest.mark.quick
def test_smoke() -> None:
    o, same_dtype, oracle = forward_case(Case("k8-w1-small", 5), torch.float32, "gelu")
    assert_accurate(OPS["kron_matmul"](o.x, o.a, o.b, o.bias, 1), same_dtype, oracle)
    o, same_dtype, oracles = backward_case(Case("odd", 5), torch.float32)
    for values in zip(OPS["kron_matmul_backward"](o.grad, o.x, o.a, o.b, 15), same_dtype, oracles, NAMES, strict=True):
        assert_accurate(*values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.id)
def test_forward_and_backward(case: Case, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = forward_case(case, dtype)
    assert_accurate(OPS["kron_matmul"](o.x, o.a, o.b, o.bias, 0), same_dtype, oracle)
    o, torchs, oracles = backward_case(case, dtype)
    found = OPS["kron_matmul_backward"](o.grad, o.x, o.a, o.b, 15)
    for actual, same, want, name in zip(found, torchs, oracles, NAMES, strict=True):
        assert_accurate(actual, same, want, name)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("shape", ["k8-w1-small", "balanced-expand"])
def test_activations(shape: str, activation: str) -> None:
    o, same_dtype, oracle = forward_case(Case(shape, 5), torch.float32, activation)
    code = 1 + list(reference.ACTIVATIONS).index(activation)
    assert_accurate(OPS["kron_matmul"](o.x, o.a, o.b, o.bias, code), same_dtype, oracle)


@pytest.mark.parametrize("shape", ["k8-w1-small", "odd", "balanced"])
def test_only_the_gradients_needed(shape: str) -> None:
    o = make(Case(shape, 5))
    everything = OPS["kron_matmul_backward"](o.grad, o.x, o.a, o.b, 15)
    for bit, value in enumerate(everything):
        some = OPS["kron_matmul_backward"](o.grad, o.x, o.a, o.b, 1 << bit)
        torch.testing.assert_close(some[bit], value)
        assert [tensor.numel() for other, tensor in enumerate(some) if other != bit] == [0, 0, 0]


@pytest.mark.parametrize("shape", ["k8-attention-small", "k8-w1-small", "balanced"])
def test_added_to_a_tensor(shape: str) -> None:
    o = make(Case(shape, 17))
    base = torch.randn_like(o.grad)
    expected = reference.kron_addmm(base.double(), o.x.double(), o.a.double(), o.b.double(), 0.5)
    torch.testing.assert_close(OPS["kron_addmm"](base, o.x, o.a, o.b, 0.5).double(), expected, rtol=1e-5, atol=1e-5)
    OPS["kron_addmm_"](base, o.x, o.a, o.b, 0.5)
    torch.testing.assert_close(base.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_a_row_that_is_not_finite_stays_alone() -> None:
    o = make(Case("k8-attention-small", 5))
    o.x[3] = float("nan")
    y = OPS["kron_matmul"](o.x, o.a, o.b, o.bias, 0)
    assert y.isnan().all(1).tolist() == [False, False, False, True, False]


@pytest.mark.quick
def test_no_tokens_launch_nothing() -> None:
    with recording(Device(90, 132, 227 * 1024)) as launches:
        for shape in ("k8-attention-small", "balanced"):
            o = make(Case(shape, 0))
            assert OPS["kron_matmul"](o.x, o.a, o.b, o.bias, 0).shape == o.grad.shape
            dx, *sums = OPS["kron_matmul_backward"](o.grad, o.x, o.a, o.b, 15)
            assert dx.shape == o.x.shape
            assert all(tensor.eq(0).all() for tensor in sums)
    assert launches == []


@pytest.mark.quick
def test_what_no_kernel_takes() -> None:
    assert "float64" in str(tiles.unsupported_reason(Product(1, 24, 24, 2, 2), torch.float64))
    assert "neither factor is tiny" in str(tiles.unsupported_reason(Product(3, 300, 300, 40, 20), torch.float16))
    # Factors of which each fits, and a token's grid does not.
    assert tiles.unsupported_reason(Product(1, 128, 128, 128, 128), torch.float16) is not None
    for case in CASES:
        o = make(case)
        assert tiles.unsupported_reason(Product.of(o.a, o.b), torch.bfloat16) is None, case.id
