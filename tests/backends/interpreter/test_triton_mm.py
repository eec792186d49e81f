"""Products and their gradients by the Triton kernels against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.backends.triton import mm, plan
from kron_kernels.backends.triton.launch import Device, recording
from kron_kernels.schemas import registry
from kron_kernels.schemas.product import Product
from tests.cases import CASES, Case, assert_accurate, backward_case, forward_case, make

# The interpreter takes milliseconds a program and some more for each product in it: the large shapes once, small.
_CASES = [case for case in CASES if case.shape not in ("k8-attention", "k21-attention") and case.tokens <= 100]
_CASES += [Case("k8-attention", 5), Case("k21-attention", 33)]
_DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = forward_case(case, dtype)
    assert_accurate(mm.kron_matmul(o.x, o.a, o.b, o.bias, 0), same_dtype, oracle)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_backward(case: Case, dtype: torch.dtype) -> None:
    o, same_dtype, oracles = backward_case(case, dtype)
    found = mm.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    for actual, same, oracle, name in zip(found, same_dtype, oracles, ("dx", "da", "db", "dbias"), strict=True):
        assert actual.shape == oracle.shape
        assert_accurate(actual, same, oracle, name)


@pytest.mark.parametrize("activation", [name for name in registry.ACTIVATION_CODES if name], ids=str)
@pytest.mark.parametrize("shape", ["k8-w1-small", "k21-attention-small", "balanced-expand"])
def test_activations(shape: str, activation: str) -> None:
    o, same_dtype, oracle = forward_case(Case(shape, 17), torch.float32, activation)
    assert_accurate(mm.kron_matmul(o.x, o.a, o.b, o.bias, registry.ACTIVATION_CODES[activation]), same_dtype, oracle)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
)
@pytest.mark.parametrize("shape", ["k8-w1-small", "k8-w2-small", "odd", "balanced"])
def test_only_the_gradients_asked_for(shape: str, needs: tuple[bool, ...]) -> None:
    o, _, oracles = backward_case(Case(shape, 17), torch.float32)
    found = mm.kron_matmul_backward(o.grad, o.x, o.a, o.b, registry.needs_mask(needs))
    for actual, oracle, need in zip(found, oracles, needs, strict=True):
        assert actual.shape == (oracle.shape if need else (0,))
        if need:
            torch.testing.assert_close(actual.double(), oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["k8-attention-small", "k8-w1-small", "balanced"])
@pytest.mark.parametrize("in_place", [False, True])
def test_added_to_a_tensor(shape: str, in_place: bool) -> None:
    o = make(Case(shape, 17), torch.float32)
    base = torch.randn_like(o.grad)
    expected = base.double() + 0.5 * torch.ops.kron_kernels.kron_matmul(*(t.double() for t in (o.x, o.a, o.b)), None, 0)
    if in_place:
        mm.kron_addmm_(base, o.x, o.a, o.b, 0.5)
        actual = base
    else:
        actual = mm.kron_addmm(base, o.x, o.a, o.b, 0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    o = make(Case("k8-attention-small", 17), torch.float32)
    o.x[3] = float("nan")
    y = mm.kron_matmul(o.x, o.a, o.b, o.bias, 0)
    assert y[3].isnan().all()
    assert y[[i for i in range(17) if i != 3]].isfinite().all()


def test_what_no_kernel_takes() -> None:
    assert "float64" in str(plan.unsupported_reason(Product(1, 24, 24, 2, 2), torch.float64))
    reason = plan.unsupported_reason(Product(3, 300, 300, 40, 20), torch.float16)
    assert reason == (
        "of 3 terms of 300x300 (x) 40x20 neither factor is tiny (at most 16 rows and columns), "
        "and a program cannot hold a token's grids"
    )
    assert plan.unsupported_reason(Product(1, 300, 300, 4, 2), torch.float16) is None
    # Factors of which each fits, and a token's grid does not.
    assert plan.unsupported_reason(Product(1, 128, 128, 128, 128), torch.float16) is not None


@pytest.mark.parametrize("shape", ["k8-attention-small", "k8-w1-small", "balanced"])
def test_no_tokens_start_nothing(shape: str) -> None:
    o = make(Case(shape, 0))
    with recording(Device(90, 132, 227 * 1024)) as launches:
        assert mm.kron_matmul(o.x, o.a, o.b, o.bias, 0).shape == o.grad.shape
        mm.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    assert launches == []


def test_every_shape_of_the_table_has_a_kernel() -> None:
    for case in CASES:
        o = make(case)
        assert plan.unsupported_reason(Product.of(o.a, o.b), torch.bfloat16) is None, case.id
