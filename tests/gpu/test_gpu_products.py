"""Products and their gradients on a GPU, each backend by name, through the public functions, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels import kron_matmul
from tests import cases
from tests.cases import CASES, Case, Operands, assert_accurate, backward_case, forward_case
from tests.gpu.gpu_support import DTYPES, REHEARSED, moved, name_of, refused, with_dtypes

pytestmark = pytest.mark.gpu

_CASES = [Case("odd", 5, 2), Case("k8-w1-small", 17), Case("k8-w2-small", 17), Case("balanced", 5)]
if not REHEARSED:
    _CASES = list(CASES)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(_CASES), ids=name_of)
def test_product(case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    o, same_dtype, oracle = forward_case(case, dtype)
    d = to_device(o, device)
    with refused(backend, "kron_matmul", (d.a, d.b), dtype, case.tokens):
        y = kron_matmul(d.x, d.a, d.b, d.bias, backend=backend)
        assert_accurate(y.cpu(), same_dtype, oracle)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(_CASES), ids=name_of)
def test_gradients(case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    o, same_dtype, oracles = backward_case(case, dtype)
    d = to_device(o, device)
    with refused(backend, "kron_matmul_backward", (d.a, d.b), dtype, case.tokens):
        bias = d.grad.new_zeros(d.grad.shape[-1])
        leaves = [tensor.detach().requires_grad_() for tensor in (d.x, d.a, d.b, bias)]
        x, a, b, bias = leaves
        y = kron_matmul(x, a, b, bias, backend=backend)
        found = torch.autograd.grad(y, leaves, d.grad)
        for actual, same, oracle, name in zip(found, same_dtype, oracles, ("dx", "da", "db", "dbias"), strict=True):
            assert_accurate(actual.cpu(), same, oracle, name)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(activation: str, dtype: torch.dtype, device: str, backend: str) -> None:
    o, same_dtype, oracle = forward_case(Case("k8-w1-small", 17), dtype, activation)
    d = to_device(o, device)
    y = kron_matmul(d.x, d.a, d.b, d.bias, activation=activation, backend=backend)
    assert_accurate(y.cpu(), same_dtype, oracle)


def test_automatic_choice_is_right_everywhere(gpu: str) -> None:
    for case in CASES:
        for dtype in cases.DTYPES:
            o, same_dtype, oracle = forward_case(case, dtype)
            d = to_device(o, gpu)
            assert_accurate(kron_matmul(d.x, d.a, d.b, d.bias).cpu(), same_dtype, oracle, f"{case.id} {dtype}")


def test_tf32_follows_torch(gpu: str, backend: str) -> None:
    """Rounded products only where torch's setting allows them."""
    case = Case("k8-attention", 70)
    o, same_dtype, oracle = forward_case(case, torch.float32)
    d = to_device(o, gpu)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = kron_matmul(d.x, d.a, d.b, d.bias, backend=backend).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert_accurate(kron_matmul(d.x, d.a, d.b, d.bias, backend=backend).cpu(), same_dtype, oracle)
    assert (rounded.double() - oracle).norm() / oracle.norm() < 2e-3


def to_device(o: Operands, device: str) -> Operands:
    return Operands(*(None if tensor is None else moved(tensor, device) for tensor in vars(o).values()))  # type: ignore[arg-type]


def test_moved_operands_keep_their_layout() -> None:
    """The layouts of the table are what the kernels see on the device too."""
    for layout in cases.LAYOUTS:
        for tensor in vars(cases.make(Case("odd", 17, 2, layout))).values():
            if isinstance(tensor, Tensor):
                copy = moved(tensor, "cpu")
                assert copy.stride() == tensor.stride()
                assert copy.storage_offset() == tensor.storage_offset()
                assert torch.equal(copy, tensor)
