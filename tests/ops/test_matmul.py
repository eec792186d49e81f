"""kron_matmul and its gradients: accuracy over the table, every order of derivative, special values, properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kron_kernels import kron_matmul
from kron_kernels.schemas import reference, registry
from kron_kernels.testing import accuracy, shapes
from tests.ops.sampling import BACKENDS, HAS_CPU, LOWER, OPS, TOP, needs_extension, sampled, short

GRADIENTS = ("dx", "da", "db", "dbias")
MAIN_SHAPES = ["k8-attention-small", "k21-attention", "k8-w1-small", "k8-w2-small", "balanced"]


def leaves(shape: str = "odd", tokens: int = 3, terms: int = 2) -> tuple[Tensor, ...]:
    """x, a, b, bias in float64, each asking for its gradient."""
    o = shapes.make(shapes.Case(shape, tokens, terms), torch.float64)
    return tuple(tensor.requires_grad_() for tensor in (o.x, o.a, o.b, o.bias))


@needs_extension
@sampled(shapes.CASES)
def test_accuracy(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    o, same_dtype, oracle = accuracy.forward_case(case, dtype)
    y = OPS.kron_matmul(o.x, o.a, o.b, o.bias, 0)
    assert y.dtype is dtype
    assert y.is_contiguous()
    accuracy.assert_accurate(y, same_dtype, oracle)
    _, same_dtypes, oracles = accuracy.backward_case(case, dtype)
    gradients = OPS.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    for name, *three in zip(GRADIENTS, gradients, same_dtypes, oracles, strict=True):
        accuracy.assert_accurate(*three, name)


@needs_extension
@sampled([shapes.Case(shape, 33) for shape in ("odd", "k8-w1-small", "balanced")], others=6)
def test_fused_activations(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    for activation in reference.ACTIVATIONS:
        o, same_dtype, oracle = accuracy.forward_case(case, dtype, activation)
        y = OPS.kron_matmul(o.x, o.a, o.b, o.bias, registry.ACTIVATION_CODES[activation])
        accuracy.assert_accurate(y, same_dtype, oracle, activation)


@pytest.mark.parametrize("isa", [TOP, *LOWER], indirect=True)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_activations_over_their_whole_range(activation: str, isa: str) -> None:
    """Where exp overflows and where tails vanish, and of values that are none."""
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    x = torch.cat([torch.linspace(-120, 120, 4001), special])[:, None]
    one = torch.ones(1, 1, 1)
    y = OPS.kron_matmul(x, one, one, None, registry.ACTIVATION_CODES[activation])
    exact = reference.ACTIVATIONS[activation](x.double()).float()
    # 1 + erf and 1 + tanh cancel in float64 too: far below zero the oracle itself is off by 1e-16.
    torch.testing.assert_close(y, exact, rtol=3e-6, atol=1e-15, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_within_a_few_units_in_the_last_place(activation: str) -> None:
    """Tables (AVX-512) err by four; the formulas of other levels lose bits of large exponents."""
    tail = {"gelu": 5.6, "gelu_tanh": 5.2, "silu": 17.5}[activation]
    x = torch.linspace(-tail, tail + 3, 200_001)[:, None]
    one = torch.ones(1, 1, 1)
    y = OPS.kron_matmul(x, one, one, None, registry.ACTIVATION_CODES[activation]).double()
    exact = {
        "gelu": lambda x: 0.5 * x * torch.erfc(-x / 2**0.5),
        "gelu_tanh": lambda x: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3)),
        "silu": lambda x: x * torch.sigmoid(x),
    }[activation](x.double())
    ulp = torch.exp2(exact.abs().clamp_min(1e-30).log2().floor() - 23)
    assert ((y - exact).abs() / ulp).max() <= (4 if TOP in ("avx512", "amx") else 60)


@needs_extension
@pytest.mark.parametrize("needs", [0b0001, 0b1010, 0b0100, 0])
def test_backward_computes_what_is_needed(needs: int) -> None:
    for shape in ("odd", "k8-w2-small", "k21-attention-small", "balanced"):
        o = shapes.make(shapes.Case(shape, 17, 2))
        everything = OPS.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
        some = OPS.kron_matmul_backward(o.grad, o.x, o.a, o.b, needs)
        for need, result, full in zip(registry.needed(needs, 4), some, everything, strict=True):
            torch.testing.assert_close(result, full if need else full.new_empty(0))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_every_element_is_written_whatever_the_threads_and_their_order(dtype: torch.dtype) -> None:
    """Outputs are full of NaN beforehand; the tasks of 1 and of 3 threads run one after the other, last one first."""
    from kron_kernels import _introspect

    def buffers(*tensors: Tensor | None) -> list[Any]:  # numpy has no bfloat16
        views = (t.view(torch.uint16) if t is not None and t.element_size() == 2 else t for t in tensors)
        return [None if view is None else view.numpy() for view in views]

    # The binding brings transposed rows into order, and returns at once for no tokens: the core never sees them.
    raw = [case for case in shapes.CASES if case.tokens > 0 and case.layout not in ("transposed-x", "expanded")]
    for case in raw[::4]:
        o, same_dtype, oracle = accuracy.forward_case(case, dtype)
        _, same_dtypes, oracles = accuracy.backward_case(case, dtype)
        for threads in (1, 3):
            how = {"threads": threads, "reverse": True}
            y = torch.full_like(same_dtype, float("nan"))
            _introspect.forward(short(dtype), *buffers(o.x, o.a, o.b, o.bias), 0, *buffers(y), **how)
            accuracy.assert_accurate(y, same_dtype, oracle)
            actual = [torch.full(g.shape, float("nan"), dtype=dtype) for g in oracles]
            _introspect.backward(short(dtype), *buffers(o.grad, o.x, o.a, o.b), *buffers(*actual), **how)
            for name, *three in zip(GRADIENTS, actual, same_dtypes, oracles, strict=True):
                accuracy.assert_accurate(*three, name)


@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[:, :, None], lambda t: t[0, 0]]
)
def test_leading_dimensions_of_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    o = shapes.make(shapes.Case("odd", 24, 2))
    x, upstream = view(o.x.view(4, 6, -1)), view(o.grad.view(4, 6, -1))
    y = OPS.kron_matmul(x, o.a, o.b, o.bias, 0)
    torch.testing.assert_close(y, reference.kron_matmul(x, o.a, o.b, o.bias))
    actual = OPS.kron_matmul_backward(upstream, x, o.a, o.b, 0b1111)
    torch.testing.assert_close(actual, reference.kron_matmul_backward(upstream, x, o.a, o.b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_matrices_are_one_term(backend: str) -> None:
    o = shapes.make(shapes.Case("odd", 4))
    y = kron_matmul(o.x, o.a[0], o.b[0].mT.contiguous().mT, o.bias, backend=backend)
    assert torch.equal(y, kron_matmul(o.x, o.a, o.b, o.bias, backend=backend))


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_nan_and_infinity_spread_as_in_dense(value: float, dtype: torch.dtype) -> None:
    for shape in ("odd", *MAIN_SHAPES):
        o = shapes.make(shapes.Case(shape, 33), dtype)
        x = o.x.clone()
        x[7, 3] = value
        dense = F.linear(x.double(), reference.kron_weight(o.a.double(), o.b.double()), o.bias.double())
        y = OPS.kron_matmul(x, o.a, o.b, o.bias, 0)
        assert torch.equal(y.isnan(), dense.isnan())
        assert torch.equal(y.isinf(), dense.isinf())
        assert torch.equal(y[7].sign(), dense[7].to(dtype).sign()) or dense[7].isnan().all()
        if dtype is torch.float32:
            o.b[0, -1, -1] = value
            dense = F.linear(o.x.double(), reference.kron_weight(o.a.double(), o.b.double()), o.bias.double())
            assert torch.equal(OPS.kron_matmul(o.x, o.a, o.b, o.bias, 0).isfinite(), dense.isfinite())


@pytest.mark.parametrize("shape", MAIN_SHAPES)
def test_runs_give_the_same_bits_and_threads_change_rounding_alone(shape: str) -> None:
    o = shapes.make(shapes.Case(shape, 257))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            gradients = OPS.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
            results.append((OPS.kron_matmul(o.x, o.a, o.b, o.bias, 1), *gradients))
    finally:
        torch.set_num_threads(before)
    for first, second, alone in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5 * alone.abs().max().item())


size = st.integers(1, 12)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x (T, n), a (S, m1, n1), b (S, m2, n2) and y (T, m) in float64."""
    m1, n1, m2, n2 = (draw(size) for _ in range(4))
    tokens, terms = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = ((tokens, n1 * n2), (terms, m1, n1), (terms, m2, n2), (tokens, m1 * m2))
    return tuple(torch.randn(each, generator=generator, dtype=torch.float64) for each in sizes)


@settings(max_examples=100, deadline=None)
@given(products())
def test_algebra(operands: tuple[Tensor, ...]) -> None:
    """Linear in each argument; terms add up; <y, (A (x) B) x> = <(A^T (x) B^T) y, x>, which is x's gradient."""
    x, a, b, y = operands

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return OPS.kron_matmul(x, a, b, None, 0)

    result, flipped = product(x, a, b), a.flip(1)
    torch.testing.assert_close(product(2 * x + x.flip(0), a, b), 2 * result + result.flip(0))
    torch.testing.assert_close(product(x, 3 * a - flipped, b), 3 * result - product(x, flipped, b))
    torch.testing.assert_close(product(x, a, 3 * b - b.flip(2)), 3 * result - product(x, a, b.flip(2)))
    terms = [(a[s : s + 1], b[s : s + 1]) for s in range(a.shape[0])]
    torch.testing.assert_close(result, sum(product(x, *term) for term in terms))
    transposed = product(y, a.mT, b.mT)
    torch.testing.assert_close((y * result).sum(), (transposed * x).sum())
    dx, da, db, _ = OPS.kron_matmul_backward(y, x, a, b, 0b0111)
    torch.testing.assert_close(dx, transposed)
    for s, term in enumerate(terms):
        one = OPS.kron_matmul_backward(y, x, *term, 0b0110)
        torch.testing.assert_close((da[s : s + 1], db[s : s + 1]), one[1:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_gradcheck(backend: str, activation: str | None) -> None:
    torch.autograd.gradcheck(lambda *t: kron_matmul(*t, activation=activation, backend=backend), leaves())


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (1, 2), (0, 1, 2, 3)])
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


def test_only_the_inputs_are_kept_for_backward() -> None:
    x, a, b, bias = leaves()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kron_matmul(x, a, b, bias)
    if HAS_CPU.available:
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, a, b)}


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
def test_no_tokens_and_no_data(backend: str) -> None:
    inputs = leaves(tokens=0)
    y = kron_matmul(inputs[0].view(0, 4, 10), *inputs[1:], backend=backend)
    assert y.shape == (0, 4, 21)
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), inputs), inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))
    y = kron_matmul(*(tensor.to("meta") for tensor in leaves()), activation="relu")
    assert (y.device.type, y.shape) == ("meta", (3, 21))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_grad", [False, True])
def test_autocast_casts_as_linear_does(backend: str, with_grad: bool) -> None:
    o = shapes.make(shapes.Case("k8-attention-small", 9))
    x, a, b, bias = inputs = tuple(tensor.requires_grad_(with_grad) for tensor in (o.x, o.a, o.b, o.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kron_matmul(x, a, b, bias, backend=backend)
        dense = F.linear(x, reference.kron_weight(a, b), bias)
        double = kron_matmul(x.double(), a.double(), b.double(), backend=backend)
        mixed = kron_matmul(x.bfloat16(), a, b, bias, backend=backend)
    assert y.dtype is dense.dtype is mixed.dtype is torch.bfloat16
    assert double.dtype is torch.float64
    torch.testing.assert_close(y, dense, rtol=0.05, atol=0.05)
    if with_grad:
        gradients, expected = (torch.autograd.grad(each.float().sum(), inputs) for each in (y, dense))
        assert all(gradient.dtype is torch.float32 for gradient in gradients)
        torch.testing.assert_close(gradients, expected, rtol=0.05, atol=0.5)
