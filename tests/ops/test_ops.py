"""The registered ops: what torch asks of an op, bad input to the op itself, special values, threads, properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kron_kernels import backends
from kron_kernels.schemas import matmul, reference, registry
from kron_kernels.testing import shapes

HAS_CPU = backends.available()["cpu"]
needs_extension = pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(tokens: int, dtype: torch.dtype) -> None:
    o = shapes.make(shapes.Case("odd", tokens, 2), dtype)
    torch.library.opcheck(matmul.kron_matmul, (o.x, o.a, o.b, o.bias, 1))
    torch.library.opcheck(matmul.kron_matmul, (o.x, o.a.mT.contiguous().mT, o.b, None, 0))
    torch.library.opcheck(matmul.kron_matmul_backward, (o.grad, o.x, o.a, o.b, 0b1111))
    torch.library.opcheck(matmul.kron_matmul_backward, (o.grad, o.x, o.a, o.b, 0b0010))


@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[:, :, None]]
)
def test_leading_dimensions_of_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    o = shapes.make(shapes.Case("odd", 24, 2))
    x, grad = view(o.x.view(4, 6, -1)), view(o.grad.view(4, 6, -1))
    y = matmul.kron_matmul(x, o.a, o.b, o.bias, 0)
    torch.testing.assert_close(y, reference.kron_matmul(x, o.a, o.b, o.bias))
    actual = matmul.kron_matmul_backward(grad, x, o.a, o.b, 0b1111)
    torch.testing.assert_close(actual, reference.kron_matmul_backward(grad, x, o.a, o.b))


def test_one_token_without_leading_dimension() -> None:
    o = shapes.make(shapes.Case("odd", 1))
    y = matmul.kron_matmul(o.x[0], o.a, o.b, o.bias, 0)
    torch.testing.assert_close(y, reference.kron_matmul(o.x[0], o.a, o.b, o.bias))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_a_pair_of_matrices_is_a_stack_of_one(backend: str) -> None:
    o = shapes.make(shapes.Case("odd", 5))
    op = matmul.kron_matmul if backend == "compiled" else registry.REFERENCES["kron_matmul"]
    assert torch.equal(op(o.x, o.a[0], o.b[0].mT.contiguous().mT, o.bias, 0), op(o.x, o.a, o.b, o.bias, 0))
    torch.library.opcheck(matmul.kron_matmul, (o.x, o.a[0], o.b[0], o.bias, 0))


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_activations_over_their_whole_range(activation: str) -> None:
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    x = torch.cat([torch.linspace(-120, 120, 4001), special])[:, None]
    one = torch.ones(1, 1, 1)
    y = matmul.kron_matmul(x, one, one, None, registry.ACTIVATION_CODES[activation])
    exact = reference.ACTIVATIONS[activation](x.double()).float()
    # 1 + erf and 1 + tanh cancel in float64 too: far below zero the oracle itself is off by 1e-16.
    torch.testing.assert_close(y, exact, rtol=2e-6, atol=1e-15, equal_nan=True)


def test_no_tokens_give_zero_gradients() -> None:
    o = shapes.make(shapes.Case("odd", 0, 2))
    dx, da, db, dbias = matmul.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    assert dx.shape == (0, 10)
    for gradient in (da, db, dbias):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", ["odd", "k8-attention-small", "k8-w1-small", "k8-w2-small", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_spread_as_in_dense(shape: str, value: float, dtype: torch.dtype) -> None:
    o = shapes.make(shapes.Case(shape, 33), dtype)
    x = o.x.clone()
    x[7, 3] = value
    dense = torch.nn.functional.linear(x.double(), reference.kron_weight(o.a.double(), o.b.double()), o.bias.double())
    y = matmul.kron_matmul(x, o.a, o.b, o.bias, 0)
    assert torch.equal(y.isnan(), dense.isnan())
    assert torch.equal(y.isinf(), dense.isinf())
    assert torch.equal(y[7].sign(), dense[7].to(dtype).sign()) or dense[7].isnan().all()


@pytest.mark.parametrize("position", ["a", "b"])
def test_nan_in_a_factor_spreads_as_in_dense(position: str) -> None:
    o = shapes.make(shapes.Case("balanced", 33))
    getattr(o, position)[0, 2, 3] = float("nan")
    dense = torch.nn.functional.linear(o.x, reference.kron_weight(o.a, o.b), o.bias)
    assert torch.equal(matmul.kron_matmul(o.x, o.a, o.b, o.bias, 0).isnan(), dense.isnan())


BAD_FORWARD: list[tuple[Callable[..., Any], str]] = [
    (
        lambda x, a, b, c: (x[:, 1:], a, b, c, 0),
        r"x: expected \(\.\.\., n1 \* n2\) = \(\.\.\., 10\), got shape \(5, 9\)",
    ),
    (lambda x, a, b, c: (x, a[0], b, c, 0), r"a: expected \(S, m1, n1\).*got shape \(3, 5\)"),
    (lambda x, a, b, c: (x, a, b[:1], c, 0), r"b: expected \(S, m2, n2\) with S = 2.*got shape \(1, 7, 2\)"),
    (lambda x, a, b, c: (x, a[:0], b[:0], c, 0), r"a: expected .* no empty dimension, got shape \(0, 3, 5\)"),
    (lambda x, a, b, c: (x, a.double(), b, c, 0), "a: expected the dtype of x"),
    (lambda x, a, b, c: (x, a, b, c.bfloat16(), 0), "bias: expected the dtype of x"),
    (lambda x, a, b, c: (x, a, b, c[1:], 0), r"bias: expected \(m1 \* m2,\) = \(21,\), got shape \(20,\)"),
    (lambda x, a, b, c: (x, a, b, c, 7), "activation: expected a code from 0 to 4, got 7"),
    (
        lambda x, a, b, c: (x.int(), a.int(), b.int(), c.int(), 0),
        "x: expected dtype float32, float64, bfloat16 or float16",
    ),
    (lambda x, a, b, c: (x[0, 0], a, b, c, 0), r"x: expected .*got shape \(\)"),
]


@needs_extension
@pytest.mark.parametrize(("change", "message"), BAD_FORWARD, ids=[message[:12] for _, message in BAD_FORWARD])
def test_op_refuses_bad_input(change: Callable[..., Any], message: str) -> None:
    o = shapes.make(shapes.Case("odd", 5, 2))
    with pytest.raises(ValueError, match=message):
        matmul.kron_matmul(*change(o.x, o.a, o.b, o.bias))


@needs_extension
@pytest.mark.parametrize("bad", [lambda g: g[1:], lambda g: g[:, 1:], lambda g: g[0]])
def test_backward_op_refuses_a_gradient_of_another_shape(bad: Callable[[Tensor], Tensor]) -> None:
    o = shapes.make(shapes.Case("odd", 5, 2))
    with pytest.raises(
        ValueError, match=r"grad: expected the shape of x, \(5, 10\), with last dimension m1 \* m2 = 21"
    ):
        matmul.kron_matmul_backward(bad(o.grad), o.x, o.a, o.b, 0b1111)
    with pytest.raises(ValueError, match="grad: expected the dtype of x"):
        matmul.kron_matmul_backward(o.grad.half(), o.x, o.a, o.b, 0b1111)


@pytest.mark.parametrize("shape", ["k8-attention-small", "k21-attention", "k8-w1-small", "k8-w2-small", "balanced"])
def test_two_runs_give_the_same_bits(shape: str) -> None:
    o = shapes.make(shapes.Case(shape, 129))
    runs = [
        (
            matmul.kron_matmul(o.x, o.a, o.b, o.bias, 1),
            *matmul.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111),
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", ["k8-attention-small", "k21-attention", "k8-w1-small", "k8-w2-small", "balanced"])
def test_threads_change_nothing_but_rounding(shape: str) -> None:
    o = shapes.make(shapes.Case(shape, 257))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            gradients = matmul.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
            results.append((matmul.kron_matmul(o.x, o.a, o.b, o.bias, 0), *gradients))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * one.abs().max().item())


size = st.integers(1, 12)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x (T, n), a (S, m1, n1), b (S, m2, n2) and y (T, m) in float64."""
    m1, n1, m2, n2 = (draw(size) for _ in range(4))
    tokens, terms = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = ((tokens, n1 * n2), (terms, m1, n1), (terms, m2, n2), (tokens, m1 * m2))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return matmul.kron_matmul(x, a, b, None, 0)


@settings(max_examples=60, deadline=None)
@given(products())
def test_product_is_linear_in_each_argument(operands: tuple[Tensor, ...]) -> None:
    x, a, b, _ = operands
    y = product(x, a, b)
    torch.testing.assert_close(product(2 * x + x.flip(0), a, b), 2 * y + y.flip(0))
    other = a.flip(1)
    torch.testing.assert_close(product(x, 3 * a - other, b), 3 * y - product(x, other, b))
    other = b.flip(2)
    torch.testing.assert_close(product(x, a, 3 * b - other), 3 * y - product(x, a, other))


@settings(max_examples=60, deadline=None)
@given(products())
def test_transpose_identity(operands: tuple[Tensor, ...]) -> None:
    """<y, (A (x) B) x> = <(A^T (x) B^T) y, x>, and the gradient of x is that transposed product."""
    x, a, b, y = operands
    transposed = product(y, a.mT, b.mT)
    torch.testing.assert_close((y * product(x, a, b)).sum(), (transposed * x).sum())
    dx = matmul.kron_matmul_backward(y, x, a, b, 0b0001)[0]
    torch.testing.assert_close(dx, transposed)


@settings(max_examples=60, deadline=None)
@given(products())
def test_identity_factors(operands: tuple[Tensor, ...]) -> None:
    x, a, b, _ = operands
    (_, _, n1), (_, m2, n2) = a.shape, b.shape
    eye1, eye2 = torch.eye(n1, dtype=x.dtype)[None], torch.eye(n2, dtype=x.dtype)[None]
    assert torch.equal(product(x, eye1, eye2), x)
    torch.testing.assert_close(
        product(x, eye1, b[:1]), (x.view(-1, n1, n2) @ b[0].T).reshape(-1, n1 * m2), rtol=1e-12, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(products())
def test_terms_add_up(operands: tuple[Tensor, ...]) -> None:
    x, a, b, y = operands
    terms = range(a.shape[0])
    torch.testing.assert_close(product(x, a, b), sum(product(x, a[s : s + 1], b[s : s + 1]) for s in terms))
    _, da, db, _ = matmul.kron_matmul_backward(y, x, a, b, 0b0110)
    for s in terms:
        one = matmul.kron_matmul_backward(y, x, a[s : s + 1], b[s : s + 1], 0b0110)
        torch.testing.assert_close((da[s : s + 1], db[s : s + 1]), one[1:3])
