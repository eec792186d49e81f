"""The public functions of whole blocks: gradients of every order, transforms, compilation, autocast, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from kron_kernels import (
    AddNorm,
    backends,
    kron_embedding,
    kron_ffn,
    kron_matmul_norm,
    kron_qkv,
)
from kron_kernels.schemas import reference
from tests.ops import block_cases

OPS = torch.ops.kron_kernels

HAS_CPU = backends.available()["cpu"].available
BACKENDS = [None, "reference", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="no extension"))]


def small(dtype: torch.dtype = torch.float64, tokens: int = 3) -> block_cases.Ffn:
    return block_cases.make_ffn(block_cases.FfnCase("unchained", tokens), dtype)


def leaves(o: block_cases.Ffn) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in o.layers)


def tiny_leaves() -> tuple[Tensor, ...]:
    """x (2, 6), and a pair (4, 2) (x) (3, 3), then (2, 4) (x) (2, 3): small enough for finite differences."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6), (1, 4, 2), (1, 3, 3), (12,), (1, 2, 4), (1, 2, 3), (4,))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
def test_ffn_is_the_two_dense_layers(backend: str | None, activation: str | None) -> None:
    o = small(tokens=12)
    x = o.x.view(2, 6, -1)
    norm = AddNorm(o.residual.view(2, 6, -1), o.weight, o.bias, 1e-5)
    hidden = F.linear(x, reference.kron_weight(o.a1, o.b1), o.bias1)
    hidden = hidden if activation is None else reference.ACTIVATIONS[activation](hidden)
    dense = F.linear(hidden, reference.kron_weight(o.a2, o.b2), o.bias2)
    y = kron_ffn(x, *o.layers[1:], activation=activation, backend=backend)
    torch.testing.assert_close(y, dense)
    normed = kron_ffn(x, *o.layers[1:], activation=activation, norm=norm, backend=backend)
    torch.testing.assert_close(
        normed, F.layer_norm(norm.residual + dense, (o.weight.shape[0],), o.weight, o.bias, 1e-5)
    )


def test_matrices_are_stacks_of_one() -> None:
    o = small(torch.float32)
    matrices = [tensor[0] if tensor.dim() == 3 else tensor for tensor in o.layers[1:]]
    assert torch.equal(kron_ffn(o.x, *matrices), kron_ffn(o.x, *o.layers[1:]))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_ffn_gradcheck(activation: str | None) -> None:
    torch.autograd.gradcheck(lambda *t: kron_ffn(*t, activation=activation), tiny_leaves())


def test_ffn_gradgradcheck() -> None:
    torch.autograd.gradgradcheck(lambda *t: kron_ffn(*t), tiny_leaves())


@pytest.mark.parametrize("needed", [(0,), (1, 2), (3,), (4, 6), (5,)])
def test_ffn_gradients_of_some_inputs(needed: tuple[int, ...]) -> None:
    inputs = tuple(tensor.requires_grad_(index in needed) for index, tensor in enumerate(tiny_leaves()))
    torch.autograd.gradcheck(lambda *t: kron_ffn(*t), inputs)


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_ffn_without_biases(biases: tuple[bool, bool]) -> None:
    x, a1, b1, bias1, a2, b2, bias2 = tiny_leaves()
    bias1, bias2 = (bias if there else None for bias, there in zip((bias1, bias2), biases, strict=True))
    y = kron_ffn(x, a1, b1, bias1, a2, b2, bias2)
    torch.testing.assert_close(y, reference.kron_ffn(x, a1, b1, bias1, a2, b2, bias2, "gelu"))
    y.sum().backward()
    assert x.grad is not None


def test_gradients_of_norm_and_projections_and_embedding() -> None:
    x, a, b, bias, *_ = tiny_leaves()
    residual, weight, norm_bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 12), 12, 12)
    )

    def normed(*t: Tensor) -> Tensor:
        return kron_matmul_norm(*t[:4], AddNorm(*t[4:], 1e-3))

    torch.autograd.gradcheck(normed, (x, a, b, bias, residual, weight, norm_bias))
    torch.autograd.gradcheck(lambda x, a, b: kron_qkv(x, [a, -a], [b, 2 * b]), (x, a, b))
    ids = torch.tensor([[2, 0], [1, 2]])
    rows = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    row = torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda a, b, t, w, c: kron_embedding(
            ids, a, b, position_ids=torch.arange(2), position_weight=t, norm_weight=w, norm_bias=c, eps=1e-3
        ),
        (rows, row, table, weight, norm_bias),
    )


def test_only_the_inputs_are_kept_for_backward() -> None:
    inputs = leaves(small())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kron_ffn(*inputs)
    if HAS_CPU:
        assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in inputs}


def test_func_grad_and_vmap() -> None:
    inputs = tuple(tensor.detach() for tensor in tiny_leaves())
    expected = torch.autograd.grad(reference.kron_ffn(*(leaf := tiny_leaves()), "gelu").sum(), leaf)
    actual = torch.func.grad(lambda *t: kron_ffn(*t).sum(), argnums=tuple(range(7)))(*inputs)
    torch.testing.assert_close(actual, expected)
    x = torch.stack([inputs[0], -inputs[0], 2 * inputs[0]])
    rows = torch.vmap(lambda x: kron_ffn(x, *inputs[1:]))(x)
    torch.testing.assert_close(rows, kron_ffn(x, *inputs[1:]))


@pytest.mark.compile
def test_compiles_whole_and_once_for_all_batches() -> None:
    o = small(torch.float32)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        q, k = kron_qkv(x, [o.a1, -o.a1], [o.b1, o.b1], [o.bias1, o.bias1])
        y = kron_ffn(x, *o.layers[1:], norm=AddNorm(residual, o.weight, o.bias))
        return y + q.mean(-1, keepdim=True) * k.mean(-1, keepdim=True)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        compiled(o.x, o.residual)
        compiled_once = counter.frame_count
        for tokens in (3, 5, 9):
            o2 = small(torch.float32, tokens)
            torch.testing.assert_close(compiled(o2.x, o2.residual), block(o2.x, o2.residual))
    assert counter.frame_count == compiled_once
    x = o.x.clone().requires_grad_()
    trained = torch.compile(lambda x: kron_ffn(x, *o.layers[1:]), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(trained(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(kron_ffn(x, *o.layers[1:]).sum(), x)[0])


def op_arguments() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    o = small(torch.float32)
    norm = (o.residual, o.weight, o.bias, 1e-5)
    ids = torch.tensor([[1, 0, 3]])
    rows, row = torch.randn(1, 4, 6), torch.randn(1, 1, 2)
    table, vector = torch.randn(5, 12), torch.randn(12)
    return {
        "kron_matmul_norm": (
            OPS.kron_matmul_norm,
            (o.x, o.a1, o.b1, None, torch.randn(3, 60), *torch.randn(2, 60), 1e-5),
        ),
        "kron_ffn": (OPS.kron_ffn, (*o.layers, 1, None, None, None, 0.0)),
        "kron_ffn-norm": (OPS.kron_ffn, (*o.layers, 2, *norm)),
        "kron_ffn_backward": (OPS.kron_ffn_backward, (o.grad, *o.layers[:6], 1, 0b1010101)),
        "kron_qkv": (OPS.kron_qkv, (o.x, [o.a1, o.a1], [o.b1, o.b1], [], [])),
        "kron_embedding": (
            OPS.kron_embedding,
            (ids, rows, row, torch.arange(3), table, None, None, vector, vector, 1e-5),
        ),
    }


@pytest.mark.parametrize("name", list(op_arguments()))
def test_opcheck(name: str) -> None:
    op, arguments = op_arguments()[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    o = block_cases.make_ffn(block_cases.FfnCase("k8", 9), torch.float32)
    inputs = tuple(tensor.detach().requires_grad_(grad) for tensor in o.layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kron_ffn(*inputs)
        q, _ = kron_qkv(inputs[0], [o.a1, o.a1], [o.b1, o.b1])
    assert y.dtype is q.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), kron_ffn(*inputs), rtol=0.05, atol=0.1)
    if grad:
        y.float().sum().backward()
        assert all(tensor.grad.dtype is torch.float32 for tensor in inputs)


@pytest.mark.parametrize("shape", list(block_cases.FFN_SHAPES))
def test_two_runs_give_the_same_bits(shape: str) -> None:
    o = block_cases.make_ffn(block_cases.FfnCase(shape, 129), torch.float32)
    runs = [(kron_ffn(*o.layers), *OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, 0b1111111)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    o = small(torch.float32)
    x = torch.zeros(shape, requires_grad=True)
    y = kron_ffn(x, *(tensor.requires_grad_() for tensor in o.layers[1:]))
    assert y.shape == (*shape[:-1], 24)
    for gradient in torch.autograd.grad(y.sum(), (x, *o.layers[1:])):
        assert not gradient.any()
    with torch.no_grad():
        assert kron_ffn(x, *o.layers[1:]).shape == y.shape
        assert [q.shape for q in kron_qkv(x, [o.a1], [o.b1])] == [(*shape[:-1], 60)]
        assert kron_embedding(torch.zeros(shape[:-1], dtype=torch.long), o.a1, o.b1[:, :1]).shape == (*shape[:-1], 24)


def test_shapes_alone_on_the_meta_device() -> None:
    o = small(torch.float32)
    meta = [tensor.to("meta") for tensor in o.layers]
    assert kron_ffn(*meta).shape == (3, 24)
    assert kron_ffn(*meta).device.type == "meta"


X, A1, B1, A2, B2 = torch.randn(5, 24), torch.randn(6, 2), torch.randn(10, 12), torch.randn(2, 10), torch.randn(12, 6)
NORM = AddNorm(torch.randn(5, 24), torch.randn(24), torch.randn(24))
IDS, ROWS, ROW = torch.tensor([[1, 0, 3]]), torch.randn(4, 6), torch.randn(1, 2)
TABLE = torch.randn(5, 12)

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: kron_ffn(X, A1, B1, None, A2[:, 1:], B2, None),
        ValueError,
        r"a2, b2: expected n1 \* n2 = 60, what the first",
    ),
    (
        lambda: kron_ffn(X[:, 1:], A1, B1, None, A2, B2, None),
        ValueError,
        r"x: expected last dimension n1 \* n2 = 2 \* 12",
    ),
    (
        lambda: kron_ffn(X, A1, B1, torch.ones(3), A2, B2, None),
        ValueError,
        r"bias: expected shape \(m1 \* m2,\) = \(6 \* 10,\)",
    ),
    (lambda: kron_ffn(X, A1, B1, None, A2.double(), B2, None), TypeError, "a: expected the dtype of x"),
    (lambda: kron_ffn(X, A1, B1, None, A2, "B2", None), TypeError, "b: expected a Tensor, got str"),
    (lambda: kron_ffn(X, A1, B1, None, A2, B2, None, activation="tanh"), ValueError, "activation: expected one of"),
    (
        lambda: kron_ffn(X, A1, B1, None, A2, B2, None, norm=NORM._replace(residual=X[1:])),
        ValueError,
        r"norm.residual: expected shape \(5, 24\), got \(4, 24\)",
    ),
    (
        lambda: kron_ffn(X, A1, B1, None, A2, B2, None, norm=NORM._replace(weight=X)),
        ValueError,
        r"norm.weight: expected shape \(24,\)",
    ),
    (
        lambda: kron_ffn(X, A1, B1, None, A2, B2, None, norm=NORM._replace(bias=NORM.bias.half())),
        TypeError,
        "norm.bias: expected the dtype of x",
    ),
    (
        lambda: kron_ffn(X, A1, B1, None, A2, B2, None, norm=NORM._replace(eps=-1.0)),
        ValueError,
        "norm.eps: expected a number of at least 0, got -1.0",
    ),
    (lambda: kron_ffn(X, A1, B1, None, A2, B2, None, backend="gpu"), ValueError, "backend: expected one of"),
    (lambda: kron_matmul_norm(X, A1, B1, None, NORM), ValueError, r"norm.residual: expected shape \(5, 60\)"),
    (
        lambda: kron_qkv(X, [A1], [B1, B1]),
        ValueError,
        "a, b, bias: expected as many of each, at least one projection, got 1, 2 and 1",
    ),
    (lambda: kron_qkv(X, [], []), ValueError, "at least one projection, got 0, 0 and 0"),
    (lambda: kron_qkv(X, [A1, A1.T], [B1, B1]), ValueError, r"x: expected last dimension n1 \* n2 = 6 \* 12"),
    (
        lambda: kron_embedding(IDS.float(), ROWS, ROW),
        TypeError,
        "ids: expected dtype int64 or int32, got torch.float32",
    ),
    (
        lambda: kron_embedding(IDS, ROWS, ROW.T),
        ValueError,
        r"b: expected row vectors \(S, 1, k\), got shape \(1, 2, 1\)",
    ),
    (lambda: kron_embedding(IDS, ROWS.int(), ROW.int()), TypeError, "a: expected dtype float32"),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, position_ids=IDS),
        ValueError,
        "position_weight: expected a Tensor along with position_ids, got None",
    ),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, type_weight=TABLE),
        ValueError,
        "type_ids: expected a Tensor along with type_weight, got None",
    ),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, type_ids=IDS, type_weight=TABLE[:, 1:]),
        ValueError,
        r"type_weight: expected shape \(rows, 12\), got \(5, 11\)",
    ),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, type_ids=IDS[:, :2], type_weight=TABLE),
        ValueError,
        r"type_ids: expected a shape that broadcasts to that of ids, \(1, 3\), got \(1, 2\)",
    ),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, norm_weight=TABLE[0]),
        ValueError,
        "norm_bias: expected both norm_weight and norm_bias or neither",
    ),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, norm_weight=TABLE[0], norm_bias=TABLE),
        ValueError,
        r"norm_bias: expected shape \(12,\)",
    ),
    (lambda: kron_embedding(IDS + 1, ROWS, ROW), IndexError, r"ids: expected indices in \[0, 4\), got 4"),
    (lambda: kron_embedding(-IDS, ROWS, ROW), IndexError, r"ids: expected indices in \[0, 4\), got -1"),
    (
        lambda: kron_embedding(IDS, ROWS, ROW, position_ids=IDS * 2, position_weight=TABLE),
        IndexError,
        r"position_ids: expected indices in \[0, 5\), got 6",
    ),
]


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[f"{i}-{bad[2][:24]}" for i, bad in enumerate(BAD)])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str, grad: bool) -> None:
    """The same message whether the op or a composition computes."""
    for tensor in (X, ROWS):
        tensor.requires_grad_(grad)
    try:
        with pytest.raises(error, match=message):
            call()
    finally:
        for tensor in (X, ROWS):
            tensor.requires_grad_(False)
