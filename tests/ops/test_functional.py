"""kron_matmul: values, gradients of every order, bad input, autocast, what is kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kron_kernels import backends, kron_matmul
from kron_kernels.schemas import reference
from kron_kernels.testing import accuracy, shapes

HAS_CPU = backends.available()["cpu"]
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)),
]


def leaves(shape: str = "odd", tokens: int = 3, terms: int = 2) -> tuple[Tensor, ...]:
    """x, a, b, bias in float64, each asking for its gradient."""
    o = shapes.make(shapes.Case(shape, tokens, terms), torch.float64)
    return tuple(tensor.requires_grad_() for tensor in (o.x, o.a, o.b, o.bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
@pytest.mark.parametrize("grad", [False, True])
def test_is_the_dense_linear(backend: str, activation: str | None, grad: bool) -> None:
    o = shapes.make(shapes.Case("k8-w1-small", 12, 2))
    x = o.x.view(2, 6, -1).requires_grad_(grad)
    y = kron_matmul(x, o.a, o.b, o.bias, activation=activation, backend=backend)
    assert y.shape == (2, 6, o.grad.shape[1])
    assert y.requires_grad is grad
    expected = accuracy.forward_oracle(shapes.Operands(o.x.detach(), o.a, o.b, o.bias, o.grad), activation)
    torch.testing.assert_close(y.detach().flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_matrices_are_one_term(backend: str) -> None:
    o = shapes.make(shapes.Case("odd", 4))
    y = kron_matmul(o.x, o.a[0], o.b[0], o.bias, backend=backend)
    assert torch.equal(y, kron_matmul(o.x, o.a, o.b, o.bias, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck(backend: str, activation: str | None) -> None:
    torch.autograd.gradcheck(lambda *t: kron_matmul(*t, activation=activation, backend=backend), leaves())


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (0, 1, 2, 3)])
def test_gradcheck_and_gradgradcheck_of_some_inputs(needed: tuple[int, ...]) -> None:
    inputs = tuple(tensor.requires_grad_(index in needed) for index, tensor in enumerate(leaves()))
    torch.autograd.gradcheck(kron_matmul, inputs)
    if needed != (3,):  # constant in the bias: no second derivative to check
        torch.autograd.gradgradcheck(kron_matmul, inputs)


def test_third_order() -> None:
    x, a, b, _ = leaves(tokens=2, terms=1)

    def second(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(kron_matmul(x, a, b).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), a, create_graph=True)[0]

    torch.autograd.gradcheck(second, (x, a, b))


def test_gradients_agree_with_the_reference_over_leading_dimensions() -> None:
    inputs = leaves("balanced", 6, 1)
    gradients = []
    for backend in (None, "reference"):
        y = kron_matmul(inputs[0].view(2, 3, -1), *inputs[1:], activation="silu", backend=backend)
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
    torch.testing.assert_close(*gradients)


def test_only_the_inputs_are_kept_for_backward() -> None:
    x, a, b, bias = leaves()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kron_matmul(x, a, b, bias, backend="cpu" if HAS_CPU.available else None)
    if HAS_CPU.available:
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, a, b)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    inputs = leaves(tokens=0)
    y = kron_matmul(inputs[0].view(0, 4, 10), *inputs[1:], backend=backend)
    assert y.shape == (0, 4, 21)
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_shapes_alone_on_the_meta_device() -> None:
    o = shapes.make(shapes.Case("odd", 4, 2))
    y = kron_matmul(o.x.to("meta"), o.a.to("meta"), o.b.to("meta"), o.bias.to("meta"), activation="relu")
    assert y.device.type == "meta"
    assert y.shape == (4, 21)


def test_checkpoint_recomputes_the_same_gradients() -> None:
    inputs = leaves()
    plain = torch.autograd.grad(kron_matmul(*inputs, activation="gelu").square().sum(), inputs)
    for reentrant in (False, True):
        for tensor in inputs:
            tensor.grad = None
        y = checkpoint(lambda *t: kron_matmul(*t, activation="gelu"), *inputs, use_reentrant=reentrant)
        y.square().sum().backward()
        torch.testing.assert_close(tuple(tensor.grad for tensor in inputs), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_casts_as_linear_does(backend: str, grad: bool) -> None:
    o = shapes.make(shapes.Case("k8-attention-small", 9))
    x, a, b, bias = (tensor.requires_grad_(grad) for tensor in (o.x, o.a, o.b, o.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kron_matmul(x, a, b, bias, backend=backend)
        dense = torch.nn.functional.linear(x, reference.kron_weight(a, b), bias)
        double = kron_matmul(x.double(), a.double(), b.double(), backend=backend)
        mixed = kron_matmul(x.bfloat16(), a, b, bias, backend=backend)
    assert y.dtype is dense.dtype is mixed.dtype is torch.bfloat16
    assert double.dtype is torch.float64
    torch.testing.assert_close(y, dense, rtol=0.05, atol=0.05)
    if grad:
        gradients = torch.autograd.grad(y.float().sum(), (x, a, b, bias))
        assert all(gradient.dtype is torch.float32 for gradient in gradients)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(dense.float().sum(), (x, a, b, bias)), rtol=0.05, atol=0.5
        )
