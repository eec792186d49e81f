"""The CPU kernels at every instruction-set level over the shared table, judged by the error rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kron_kernels import backends
from kron_kernels.schemas import matmul, reference, registry
from kron_kernels.testing import accuracy, shapes

pytestmark = pytest.mark.skipif(not backends.available()["cpu"].available, reason=backends.available()["cpu"].reason)

GRADIENTS = ("dx", "da", "db", "dbias")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.id)
def test_forward(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    o, same_dtype, oracle = accuracy.forward_case(case, dtype)
    y = matmul.kron_matmul(o.x, o.a, o.b, o.bias, 0)
    assert y.dtype is dtype
    assert y.is_contiguous()
    accuracy.assert_accurate(y, same_dtype, oracle)


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.id)
def test_backward(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    o, same_dtype, oracles = accuracy.backward_case(case, dtype)
    actual = matmul.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    for name, gradient, torch_gradient, oracle in zip(GRADIENTS, actual, same_dtype, oracles, strict=True):
        accuracy.assert_accurate(gradient, torch_gradient, oracle, name)


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("shape", ["odd", "k8-w1-small", "k8-attention-small", "balanced"])
def test_fused_activation(shape: str, activation: str, dtype: torch.dtype, isa: str) -> None:
    o, same_dtype, oracle = accuracy.forward_case(shapes.Case(shape, 33), dtype, activation)
    y = matmul.kron_matmul(o.x, o.a, o.b, o.bias, registry.ACTIVATION_CODES[activation])
    accuracy.assert_accurate(y, same_dtype, oracle)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_of_large_values(activation: str, isa: str) -> None:
    """Where exp overflows and where tails vanish: x of -100 .. 100 through the identity."""
    x = torch.linspace(-100, 100, 4001)[:, None]
    one = torch.ones(1, 1, 1)
    y = matmul.kron_matmul(x, one, one, None, registry.ACTIVATION_CODES[activation])
    expected = reference.ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(y.double(), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
@pytest.mark.parametrize("shape", ["odd", "k8-w2-small", "k21-attention-small", "balanced"])
def test_backward_computes_what_is_asked(shape: str, needs: tuple[bool, ...], isa: str) -> None:
    o = shapes.make(shapes.Case(shape, 17, 2))
    everything = matmul.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    for need, result, full in zip(
        needs, matmul.kron_matmul_backward(o.grad, o.x, o.a, o.b, registry.needs_mask(needs)), everything, strict=True
    ):
        if need:
            torch.testing.assert_close(result, full)
        else:
            assert result.shape == (0,)


def buffers(*tensors: torch.Tensor | None) -> list[Any]:
    """numpy views of tensors; 16-bit types as unsigned integers, for numpy has no bfloat16."""
    views = (t.view(torch.uint16) if t is not None and t.element_size() == 2 else t for t in tensors)
    return [None if view is None else view.numpy() for view in views]


# The binding brings transposed rows into order, and returns at once for no tokens: the core never sees them.
RAW_CASES = [case for case in shapes.CASES if case.tokens > 0 and case.layout not in ("transposed-x", "expanded")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("case", RAW_CASES, ids=lambda case: case.id)
def test_every_element_is_written_whatever_the_threads_and_their_order(
    case: shapes.Case, dtype: torch.dtype, isa: str
) -> None:
    """Outputs are full of NaN beforehand; the tasks of 1 and of 3 threads run one after the other, last one first."""
    from kron_kernels import _introspect

    o, same_dtype, oracle = accuracy.forward_case(case, dtype)
    _, same_dtype_gradients, oracles = accuracy.backward_case(case, dtype)
    inputs, name = (o.x, o.a, o.b), short(dtype)
    for threads in (1, 3):
        y = torch.full_like(same_dtype, float("nan"))
        _introspect.forward(name, *buffers(*inputs, o.bias), 0, *buffers(y), threads=threads, reverse=True)
        accuracy.assert_accurate(y, same_dtype, oracle)
        actual = [torch.full(g.shape, float("nan"), dtype=dtype) for g in oracles]
        _introspect.backward(name, *buffers(o.grad, *inputs), *buffers(*actual), threads=threads, reverse=True)
        for label, gradient, torch_gradient, expected in zip(
            GRADIENTS, actual, same_dtype_gradients, oracles, strict=True
        ):
            accuracy.assert_accurate(gradient, torch_gradient, expected, label)
