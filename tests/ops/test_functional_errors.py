"""Bad input to kron_matmul: each error names the argument, what was expected and what came."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kron_kernels import backends, kron_matmul
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
)
def test_bad_input(change: Callable[..., tuple[Any, ...]], options: Any, error: type[Exception], message: str) -> None:
    o = shapes.make(shapes.Case("odd", 4, 2))
    with pytest.raises(error, match=message):
        kron_matmul(*change(o.x, o.a, o.b, o.bias), **options)


def test_bad_input_inside_autocast() -> None:
    o = shapes.make(shapes.Case("odd", 4, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="a: expected the device of x, cpu, got meta"):
            kron_matmul(o.x, o.a.to("meta"), o.b)
        with pytest.raises(TypeError, match=r"b: expected the dtype of x, torch\.bfloat16, got torch\.int32"):
            kron_matmul(o.x, o.a, o.b.int())


def test_missing_backend_asked_for_by_name_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    status = backends.Status("cpu", False, "the compiled extension is absent: no compiler")
    missing = dataclasses.replace(backends.BACKENDS["cpu"], status=lambda: status)
    monkeypatch.setitem(backends.BACKENDS, "cpu", missing)
    o = shapes.make(shapes.Case("odd", 4))
    with pytest.raises(
        RuntimeError, match="backend 'cpu' is not available: the compiled extension is absent: no compiler"
    ):
        kron_matmul(o.x, o.a, o.b, backend="cpu")
    kron_matmul(o.x, o.a, o.b)


def test_backend_that_does_not_serve_the_device() -> None:
    if not backends.available()["cpu"].available:
        pytest.skip(backends.available()["cpu"].reason)
    o = shapes.make(shapes.Case("odd", 4))
    with pytest.raises(RuntimeError, match="backend 'cpu' computes tensors on the cpu, got a tensor on meta"):
        kron_matmul(o.x.to("meta"), o.a.to("meta"), o.b.to("meta"), backend="cpu")
