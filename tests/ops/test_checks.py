"""Bad input to the public functions: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kron_kernels import (
    AddNorm,
    backends,
    kron_addmm,
    kron_addmm_,
    kron_embedding,
    kron_ffn,
    kron_matmul,
    kron_matmul_norm,
    kron_qkv,
)
from kron_kernels.ops import frozen_linear_kron
from kron_kernels.testing import shapes


def bad(change: Callable[..., tuple[Any, ...]], error: type[Exception], message: str, **options: Any) -> Any:
    return pytest.param(change, options, error, message, id=message[:30])


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        bad(
            lambda x, a, b, c: (x[:, 1:], a, b),
            ValueError,
            r"x: expected last dimension n1 \* n2 = 5 \* 2 = 10, got shape \(4, 9\)",
        ),
        bad(lambda x, a, b, c: (x[0, 0], a, b), ValueError, r"x: expected last dimension .*got shape \(\)"),
        bad(
            lambda x, a, b, c: (x, a, b[:1]),
            ValueError,
            r"b: expected as many terms S as a, 2, got 1 \(shape \(1, 7, 2\)\)",
        ),
        bad(
            lambda x, a, b, c: (x, a[0], b),
            ValueError,
            r"a: expected a matrix or a stack of them, \(S, m1, n1\).*got shape \(3, 5\)",
        ),
        bad(
            lambda x, a, b, c: (x, a, b[:, :0]), ValueError, r"b: expected .* no empty dimension, got shape \(2, 0, 2\)"
        ),
        bad(
            lambda x, a, b, c: (x, a, b, c[1:]),
            ValueError,
            r"bias: expected shape \(m1 \* m2,\) = \(3 \* 7,\) = \(21,\), got \(20,\)",
        ),
        bad(
            lambda x, a, b, c: (x, a, b, c.double()),
            TypeError,
            "bias: expected the dtype of x, torch.float32, got torch.float64",
        ),
        bad(
            lambda x, a, b, c: (x, a.half(), b),
            TypeError,
            "a: expected the dtype of x, torch.float32, got torch.float16",
        ),
        bad(
            lambda x, a, b, c: (x, a, b.double()),
            TypeError,
            "b: expected the dtype of x, torch.float32, got torch.float64",
        ),
        bad(
            lambda x, a, b, c: (x.long(), a.long(), b.long()),
            TypeError,
            "x: expected dtype float32, .*, got torch.int64",
        ),
        bad(lambda x, a, b, c: (x, a.to("meta"), b), ValueError, "a: expected the device of x, cpu, got meta"),
        bad(lambda x, a, b, c: (x, a, b, c.to("meta")), ValueError, "bias: expected the device of x, cpu, got meta"),
        bad(lambda x, a, b, c: (x.tolist(), a, b), TypeError, "x: expected a Tensor, got list"),
        bad(lambda x, a, b, c: (x, None, b), TypeError, "a: expected a Tensor, got NoneType"),
        bad(lambda x, a, b, c: (x, a, b, 0.0), TypeError, "bias: expected a Tensor or None, got float"),
        bad(
            lambda x, a, b, c: (x, a, b),
            ValueError,
            "activation: expected one of None, 'gelu', .*, got 'tanh'",
            activation="tanh",
        ),
        bad(
            lambda x, a, b, c: (x, a, b),
            ValueError,
            "backend: expected one of 'auto', 'cpu', 'triton', 'cuda', 'reference', got 'mkl'",
            backend="mkl",
        ),
    ],
)  # fmt: skip
def test_matmul(change: Callable[..., tuple[Any, ...]], options: Any, error: type[Exception], message: str) -> None:
    o = shapes.make(shapes.Case("odd", 4, 2))
    with pytest.raises(error, match=message):
        kron_matmul(*change(o.x, o.a, o.b, o.bias), **options)


def test_matmul_inside_autocast() -> None:
    o = shapes.make(shapes.Case("odd", 4, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="a: expected the device of x, cpu, got meta"):
            kron_matmul(o.x, o.a.to("meta"), o.b)
        with pytest.raises(TypeError, match=r"b: expected the dtype of x, torch\.bfloat16, got torch\.int32"):
            kron_matmul(o.x, o.a, o.b.int())


def test_backend_that_does_not_serve_the_device() -> None:
    if not backends.available()["cpu"].available:
        pytest.skip(backends.available()["cpu"].reason)
    o = shapes.make(shapes.Case("odd", 4))
    with pytest.raises(RuntimeError, match="backend 'cpu' computes tensors on the cpu, got a tensor on meta"):
        kron_matmul(o.x.to("meta"), o.a.to("meta"), o.b.to("meta"), backend="cpu")


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
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[f"{i}-{bad[2][:24]}" for i, bad in enumerate(BAD)])
def test_blocks(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """The same message whether the op or a composition computes."""
    try:
        for grad in (False, True):
            for tensor in (X, ROWS):
                tensor.requires_grad_(grad)
            with pytest.raises(error, match=message):
                call()
    finally:
        for tensor in (X, ROWS):
            tensor.requires_grad_(False)


P, Q = torch.zeros(7, 3), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": None}, TypeError, r"base: expected a Tensor, got NoneType"),
        ({"base": torch.zeros(4, 20)}, ValueError, r"base: expected the shape .*, \(4, 21\), got \(4, 20\)"),
        ({"base": torch.zeros(4, 21).double()}, TypeError, r"base: expected the dtype of x, .*32, got .*64"),
        ({"base": torch.zeros(4, 21, device="meta")}, ValueError, r"base: expected the device of x, cpu, got meta"),
        ({"x": torch.zeros(4, 11)}, ValueError, r"x: expected last dimension .* 5 \* 2 = 10, got .*11"),
        ({"x": torch.zeros(4, 11), "b": (P, Q)}, ValueError, r"x: expected last dimension n1 \* n2 = 5 \* 2 = 10"),
        ({"b": 3}, TypeError, r"b: expected a Tensor, got int"),
        ({"b": (P, Q, Q)}, TypeError, r"b: expected a Tensor or a pair .*, got \(Tensor, Tensor, Tensor\)"),
        ({"b": (P, 1.0)}, TypeError, r"b: expected a Tensor or a pair \(p, q\) of Tensors, got \(Tensor, float\)"),
        ({"b": (P, P)}, ValueError, r"b: expected matrices \(m2, r\) and \(r, n2\) .*got shapes \(7, 3\) and \(7, 3\)"),
        ({"b": (P, Q[None])}, ValueError, r"b: expected matrices .*got shapes \(7, 3\) and \(1, 3, 2\)"),
        ({"b": (P[:, :0], Q[:0])}, ValueError, r"b: expected matrices .*got shapes \(7, 0\) and \(0, 2\)"),
        ({"a": torch.zeros(2, 3, 5), "b": (P, Q)}, ValueError, r"a: expected one matrix .*got shape \(2, 3, 5\)"),
        ({"b": (P.double(), Q)}, TypeError, r"b\[0\]: expected the dtype of b\[1\], torch.float32, got torch.float64"),
        ({"b": (P.double(), Q.double())}, TypeError, r"b: expected the dtype of x, torch.float32, got torch.float64"),
        ({"backend": "cuda9"}, ValueError, r"backend: expected one of"),
        ({"alpha": torch.tensor(2.0)}, TypeError, r"alpha: expected a number, got Tensor"),
    ],
)  # fmt: skip
def test_addmm(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"base": torch.zeros(4, 21), "x": torch.zeros(4, 10), "a": torch.zeros(3, 5), "b": torch.zeros(7, 2)}
    for function in (kron_addmm, kron_addmm_):
        with pytest.raises(error, match=message):
            function(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(80, 70)}, ValueError, r"weight: expected shape \(80, 72\), got \(80, 70\)"),
        ({"bias": torch.zeros(72)}, ValueError, r"bias: expected shape \(80,\), got \(72,\)"),
        (
            {"weight": torch.zeros(80, 72, requires_grad=True)},
            ValueError,
            "weight: expected a frozen tensor, got one that requires gradients",
        ),
        (
            {"bias": torch.zeros(80, requires_grad=True)},
            ValueError,
            "bias: expected a frozen tensor, got one that requires gradients",
        ),
        ({"weight": [0.0]}, TypeError, "weight: expected a Tensor, got list"),
        ({"weight": torch.zeros(80, 72).double()}, TypeError, "weight: expected the dtype of x, .*32, got .*64"),
        ({"bias": torch.zeros(80, device="meta")}, ValueError, "bias: expected the device of x, cpu, got meta"),
        ({"alpha": torch.tensor(2.0)}, TypeError, "alpha: expected a number, got Tensor"),
        ({"x": [0.0]}, TypeError, "x: expected a Tensor, got list"),
        ({"a": [0.0]}, TypeError, "a: expected a Tensor, got list"),
        ({"x": torch.zeros(4, 71)}, ValueError, "x: expected last dimension"),
        ({"b": (torch.zeros(10, 2), torch.zeros(3, 12))}, ValueError, "b: expected matrices"),
        ({"b": (torch.zeros(10, 2),)}, TypeError, "b: expected a Tensor or a pair"),
    ],
)  # fmt: skip
def test_frozen_linear(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(4, 72), "weight": torch.zeros(80, 72), "bias": torch.zeros(80)}
    given |= {"a": torch.zeros(8, 6), "b": torch.zeros(10, 12)}
    with pytest.raises(error, match=message):
        frozen_linear_kron(**{**given, **change})
