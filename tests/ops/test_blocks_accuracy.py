"""The kernels of whole blocks at every instruction-set level, judged by the error rule of the shared table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kron_kernels import backends
from kron_kernels.schemas import reference
from kron_kernels.schemas.ffn import FFN_GRADIENTS
from kron_kernels.schemas.registry import ACTIVATION_CODES
from kron_kernels.testing import accuracy, shapes
from tests.ops import block_cases

OPS = torch.ops.kron_kernels

pytestmark = pytest.mark.skipif(not backends.available()["cpu"].available, reason=backends.available()["cpu"].reason)

SLOW_TO_JUDGE = (torch.float64, torch.float16)  # right, and not tuned: fewer cases


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_ffn(o: block_cases.Ffn, case: block_cases.FfnCase, packed: bool = False) -> Tensor:
    norm: tuple[Any, ...] = o.norm if case.norm else (None, None, None, 0.0)
    packs = (OPS.kron_pack(o.a1, o.b1), OPS.kron_pack(o.a2, o.b2)) if packed else (None, None)
    return OPS.kron_ffn(*o.layers, ACTIVATION_CODES[case.activation], *norm, *packs)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize("case", block_cases.FFN_CASES, ids=lambda case: case.id)
def test_ffn(case: block_cases.FfnCase, dtype: torch.dtype, packed: bool, isa: str) -> None:
    if dtype in SLOW_TO_JUDGE and (packed or case.tokens not in (1, 33)):
        pytest.skip("the tuned dtypes run every case")
    o, same_dtype, oracle = block_cases.ffn_case(case, dtype)
    y = run_ffn(o, case, packed)
    assert y.dtype is dtype
    assert y.is_contiguous()
    accuracy.assert_accurate(y, same_dtype, oracle)


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize(
    "case",
    [case for case in block_cases.FFN_CASES if not case.norm and case.tokens not in (1, 2)],
    ids=lambda case: case.id,
)
def test_ffn_backward(case: block_cases.FfnCase, dtype: torch.dtype, isa: str) -> None:
    o = block_cases.make_ffn(case, dtype)
    same_dtype, oracles = block_cases.ffn_gradients(case, dtype)
    actual = OPS.kron_ffn_backward(o.grad, *o.layers[:6], ACTIVATION_CODES[case.activation], 0b1111111)
    for name, gradient, torch_gradient, oracle in zip(FFN_GRADIENTS, actual, same_dtype, oracles, strict=True):
        accuracy.assert_accurate(gradient, torch_gradient, oracle, name)


def test_ffn_backward_in_several_blocks_of_tokens(isa: str) -> None:
    """1500 rows of 3072 values: three blocks of 8 MB in float32, two in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        case = block_cases.FfnCase("balanced", 1500)
        o = block_cases.make_ffn(case, dtype)
        o = block_cases.Ffn(**{**vars(o), "grad": o.grad / 30})
        exact = block_cases.double(o)
        same_dtype = reference.kron_ffn_backward(o.grad, *o.layers[:6], "gelu")
        oracles = reference.kron_ffn_backward(exact.grad, *exact.layers[:6], "gelu")
        actual = OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, 0b1111111)
        for name, *gradients in zip(FFN_GRADIENTS, actual, same_dtype, oracles, strict=True):
            accuracy.assert_accurate(*gradients, name)


@pytest.mark.parametrize("needs", [0b0000001, 0b0001010, 0b1110000, 0b0000100, 0])
def test_ffn_backward_computes_what_is_asked(needs: int) -> None:
    o = block_cases.make_ffn(block_cases.FfnCase("k8", 33), torch.float32)
    everything = OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, 0b1111111)
    some = OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, needs)
    for bit, (gradient, full) in enumerate(zip(some, everything, strict=True)):
        if needs >> bit & 1:
            torch.testing.assert_close(gradient, full)
        else:
            assert gradient.shape == (0,)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.id)
def test_add_and_norm(case: shapes.Case, dtype: torch.dtype, packed: bool, isa: str) -> None:
    if dtype in SLOW_TO_JUDGE and (packed or case.layout != "contiguous"):
        pytest.skip("the tuned dtypes run every case")
    o = shapes.make(case, dtype)
    if o.grad.shape[1] < 3:
        pytest.skip("a norm of one or two values is a sign: it has no error to judge")
    norm = (*block_cases.norm_operands(o.grad, dtype), block_cases.EPS)
    same_dtype = reference.kron_matmul_norm(o.x, o.a, o.b, o.bias, *norm)
    d = o.double()
    oracle = reference.kron_matmul_norm(d.x, d.a, d.b, d.bias, *(tensor.double() for tensor in norm[:3]), norm[3])
    pack = OPS.kron_pack(o.a, o.b) if packed else None
    y = OPS.kron_matmul_norm(o.x, o.a, o.b, o.bias, *norm, pack)
    accuracy.assert_accurate(y, same_dtype, oracle)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("case", [case for case in shapes.CASES if case.tokens], ids=lambda case: case.id)
def test_joint_projections_are_the_single_ones(case: shapes.Case, dtype: torch.dtype, packed: bool, isa: str) -> None:
    """Each projection as by itself: three of them, and one more than the kernels take at a time."""
    operands = [shapes.make(case, dtype, seed) for seed in range(9 if case.shape == "odd" else 3)]
    x = operands[0].x
    a, b = [o.a for o in operands], [o.b for o in operands]
    biases = [o.bias for o in operands] if case.bias else []
    packs = [OPS.kron_pack(*pair) for pair in zip(a, b, strict=True)] if packed else []
    together = OPS.kron_qkv(x, a, b, biases, packs)
    for index, y in enumerate(together):
        alone = OPS.kron_matmul(
            x, a[index], b[index], biases[index] if biases else None, 0, packs[index] if packs else None
        )
        torch.testing.assert_close(y, alone, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)
        exact = reference.kron_matmul(x, a[index], b[index], biases[index] if biases else None)
        d = shapes.Operands(x, a[index], b[index], biases[index] if biases else None, operands[index].grad)
        accuracy.assert_accurate(y, exact, accuracy.forward_oracle(d))


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
@pytest.mark.parametrize(("terms", "p", "k", "whole"), block_cases.EMBEDDINGS)
def test_embedding(terms: int, p: int, k: int, whole: bool, dtype: torch.dtype, isa: str) -> None:
    o, same_dtype, oracle = block_cases.embedding_case(terms, p, k, whole, dtype)
    ids, a, *rest = o.operands
    y = OPS.kron_embedding(ids, a, *rest)
    assert y.shape == (3, 21, p * k)
    accuracy.assert_accurate(y, same_dtype, oracle)
    columns = OPS.kron_embedding(ids.T.contiguous().T, a.mT.contiguous().mT, *rest)
    assert torch.equal(columns, y)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activation_within_four_ulp(activation: str, isa: str) -> None:
    """The kernels with tables (AVX-512), over their range; the formulas of the others lose bits of large exponents."""
    tail = {"gelu": 5.6, "gelu_tanh": 5.2, "silu": 17.5}[activation]
    x = torch.linspace(-tail, tail + 3, 200_001)[:, None]
    one = torch.ones(1, 1, 1)
    y = OPS.kron_matmul(x, one, one, None, ACTIVATION_CODES[activation]).double()
    exact = {
        "gelu": lambda x: 0.5 * x * torch.erfc(-x / 2**0.5),
        "gelu_tanh": lambda x: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3)),
        "silu": lambda x: x * torch.sigmoid(x),
    }[activation](x.double())
    ulp = torch.exp2(exact.abs().clamp_min(1e-30).log2().floor() - 23)
    assert ((y - exact).abs() / ulp).max() <= (4 if isa in ("avx512", "amx") else 60)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", ["k8", "k21", "balanced", "tiny-right", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_token(shape: str, value: float, dtype: torch.dtype, isa: str) -> None:
    o = block_cases.make_ffn(block_cases.FfnCase(shape, 33), dtype)
    x = o.x.clone()
    x[7, 3] = value
    y = OPS.kron_ffn(x, *o.layers[1:], 1, None, None, None, 0.0)
    plain = OPS.kron_ffn(*o.layers, 1, None, None, None, 0.0)
    others = torch.arange(33) != 7
    assert torch.equal(y[others], plain[others])
    exact = reference.kron_ffn(x.double(), *(tensor.double() for tensor in o.layers[1:]), "gelu")
    assert torch.equal(y[7].isfinite(), exact[7].isfinite())
