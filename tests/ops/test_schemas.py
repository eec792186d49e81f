"""What torch asks of a registered op: schema, fake tensors, dispatch to the reference, errors of the op itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kron_kernels.ops import kron_matmul
from kron_kernels.schemas import registry
from kron_kernels.testing import shapes
from tests.ops import block_cases
from tests.ops.sampling import OPS, needs_extension

ODD = shapes.make(shapes.Case("odd", 5, 2))
NONE = shapes.make(shapes.Case("odd", 0, 2))
HALF = shapes.make(shapes.Case("odd", 5, 2), torch.bfloat16)
FFN = block_cases.make_ffn(block_cases.FfnCase("unchained", 3), torch.float32)
EMBEDDING = block_cases.make_embedding(2, 3, 4, True, torch.float32)
BARE = block_cases.make_embedding(1, 3, 4, False, torch.float32)
NORM = (torch.randn(5, 21), torch.randn(21), torch.randn(21), 1e-5)

CALLS: dict[str, tuple[Any, ...]] = {
    "kron_matmul": (ODD.x, ODD.a, ODD.b, ODD.bias, 1),
    "kron_matmul no tokens": (NONE.x, NONE.a, NONE.b, NONE.bias, 1),
    "kron_matmul bfloat16": (HALF.x, HALF.a, HALF.b, HALF.bias, 0),
    "kron_matmul transposed": (ODD.x, ODD.a.mT.contiguous().mT, ODD.b, None, 0),
    "kron_matmul matrices": (ODD.x, ODD.a[0], ODD.b[0], ODD.bias, 0),
    "kron_matmul_backward": (ODD.grad, ODD.x, ODD.a, ODD.b, 0b1111),
    "kron_matmul_backward no tokens": (NONE.grad, NONE.x, NONE.a, NONE.b, 0b1111),
    "kron_matmul_backward some": (ODD.grad, ODD.x, ODD.a, ODD.b, 0b0010),
    "kron_addmm": (ODD.grad, ODD.x, ODD.a, ODD.b, 0.7),
    "kron_addmm_": (ODD.grad.clone(), ODD.x, ODD.a, ODD.b, 0.7),
    "kron_matmul_norm": (ODD.x, ODD.a, ODD.b, None, *NORM),
    "kron_ffn": (*FFN.layers, 1, None, None, None, 0.0),
    "kron_ffn norm": (*FFN.layers, 2, *FFN.norm),
    "kron_ffn_backward": (FFN.grad, *FFN.layers[:6], 1, 0b1010101),
    "kron_qkv": (FFN.x, [FFN.a1, FFN.a1], [FFN.b1, FFN.b1], [], []),
    "kron_embedding": EMBEDDING.operands,
    "kron_embedding_backward": (EMBEDDING.grad, *EMBEDDING.operands[:8], 1e-3, 0b111111),
    "kron_embedding_backward bare": (BARE.grad, *BARE.operands[:8], 1e-3, 0b10),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, CALLS[name])


def test_the_reference_computes_what_the_kernels_do_outside_autocast() -> None:
    for name, arguments in CALLS.items():
        op = name.split()[0]
        if op == "kron_addmm_":
            continue
        with torch.autocast("cpu", torch.bfloat16):
            expected = registry.REFERENCES[op](*arguments)
            actual = getattr(OPS, op)(*arguments)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 if "16" in name else 1e-4)


def test_gradients_not_asked_for_are_empty() -> None:
    empty = [gradient.shape == (0,) for gradient in OPS.kron_ffn_backward(FFN.grad, *FFN.layers[:6], 1, 0b0001010)]
    assert empty == [True, False, True, False, True, True, True]
    assert registry.needs_mask((False, True, False, True)) == 0b1010


BAD: list[tuple[Callable[..., Any], str]] = [
    (lambda x, a, b, c: (x[:, 1:], a, b, c, 0), r"x: expected .* = \(\.\.\., 10\), got shape \(5, 9\)"),
    (lambda x, a, b, c: (x, a[0], b, c, 0), r"a: expected \(S, m1, n1\).*got shape \(3, 5\)"),
    (lambda x, a, b, c: (x, a, b[:1], c, 0), r"b: expected \(S, m2, n2\) with S = 2.*got shape \(1, 7, 2\)"),
    (lambda x, a, b, c: (x, a[:0], b[:0], c, 0), r"a: expected .* no empty dimension, got shape \(0, 3, 5\)"),
    (lambda x, a, b, c: (x, a.double(), b, c, 0), "a: expected the dtype of x"),
    (lambda x, a, b, c: (x, a, b, c.bfloat16(), 0), "bias: expected the dtype of x"),
    (lambda x, a, b, c: (x, a, b, c[1:], 0), r"bias: expected \(m1 \* m2,\) = \(21,\), got shape \(20,\)"),
    (lambda x, a, b, c: (x, a, b, c, 7), "activation: expected a code from 0 to 4, got 7"),
    (lambda x, a, b, c: (x.int(), a.int(), b.int(), c.int(), 0), "x: expected dtype float32, float64, bfloat16 or fl"),
    (lambda x, a, b, c: (x[0, 0], a, b, c, 0), r"x: expected .*got shape \(\)"),
]  # fmt: skip


@needs_extension
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:12] for _, message in BAD])
def test_the_op_names_bad_input(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS.kron_matmul(*change(ODD.x, ODD.a, ODD.b, ODD.bias))


@needs_extension
def test_the_other_ops_name_bad_input() -> None:
    shape = r"grad: expected the shape of x, \(5, 10\), with last dimension m1 \* m2 = 21"
    for bad in (ODD.grad[1:], ODD.grad[:, 1:], ODD.grad[0]):
        with pytest.raises(ValueError, match=shape):
            OPS.kron_matmul_backward(bad, ODD.x, ODD.a, ODD.b, 0b1111)
    with pytest.raises(ValueError, match="grad: expected the dtype of x"):
        OPS.kron_matmul_backward(ODD.grad.half(), ODD.x, ODD.a, ODD.b, 0b1111)
    for op in (OPS.kron_addmm, OPS.kron_addmm_):
        with pytest.raises(ValueError, match=r"base: expected the shape of x, .* m1 \* m2 = 21, got shape \(5, 20\)"):
            op(ODD.grad[:, 1:].contiguous(), ODD.x, ODD.a, ODD.b, 1.0)
        with pytest.raises(ValueError, match="base: expected the dtype of x"):
            op(ODD.grad.double(), ODD.x, ODD.a, ODD.b, 1.0)
    with pytest.raises(ValueError, match="base: expected a contiguous tensor"):
        OPS.kron_addmm_(ODD.grad.T.contiguous().T, ODD.x, ODD.a, ODD.b, 1.0)


def test_the_op_runs_when_nothing_differentiates() -> None:
    """One op a call: no composition stays behind once gradients, tangents and transforms are gone."""

    def names(**options: Any) -> set[str]:
        with torch.profiler.profile() as profile:
            kron_matmul(ODD.x, ODD.a, ODD.b, ODD.bias, **options)
        return {event.name for event in profile.events() if event.name.startswith(("aten::einsum", "kron_kernels"))}

    with torch.autograd.forward_ad.dual_level():
        assert "aten::einsum" in names()
    assert "kron_kernels::kron_matmul" in names()
    assert names(backend="reference") == {"aten::einsum"}
