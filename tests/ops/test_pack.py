"""Packed factors: an op that is given them reads no element of the plain factor, and names what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels import backends
from kron_kernels.schemas import registry
from kron_kernels.schemas.pack import packed_factor
from kron_kernels.testing.shapes import SHAPES, Case, make

OPS = torch.ops.kron_kernels
Factors = tuple[Tensor, Tensor, Tensor | None]


def packed_form(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors with one NaN of stride 0 in place of the packed one, and the packed bytes."""
    packed = OPS.kron_pack(a, b)
    nan = torch.tensor(torch.nan, dtype=a.dtype)
    if packed_factor(packed) == "a":
        return nan.expand(a.shape), b, packed
    return a, nan.expand(b.shape), packed


def second_pair(a: Tensor, b: Tensor) -> Factors:
    return (a.mT / 3).contiguous(), b.mT.contiguous(), None


def assert_same(actual: Tensor, plain: Tensor) -> None:
    """The GEMM sums in another order than dot products of few rows do: equal up to rounding."""
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[plain.dtype]
    scale = float(plain.abs().max()) if plain.numel() else 1.0
    torch.testing.assert_close(actual, plain, rtol=0, atol=tolerance * max(scale, 0.25))


CASES = [
    *((shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)),
    *((shape, dtype) for shape in ("k8-w2-small", "odd-wide", "balanced") for dtype in (torch.float64, torch.float16)),
]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_the_packed_factor_is_not_read(shape: str, dtype: torch.dtype) -> None:
    tokens = (1, 5, 33, 128)[list(SHAPES).index(shape) % 4]
    for terms in (1, 2):
        check_every_op(shape, tokens, terms, dtype)


@pytest.mark.parametrize("tokens", [1, 5, 33, 128, 1000])
@pytest.mark.parametrize("shape", ["k8-w1-small", "k21-attention-small", "balanced-expand"])
def test_at_any_number_of_tokens(shape: str, tokens: int) -> None:
    check_every_op(shape, tokens, 1, torch.float32)


def check_every_op(shape: str, tokens: int, terms: int, dtype: torch.dtype) -> None:
    o = make(Case(shape, tokens, terms), dtype)
    a, b, packed = packed_form(o.a, o.b)
    assert_same(OPS.kron_matmul(o.x, a, b, o.bias, 1, packed), OPS.kron_matmul(o.x, o.a, o.b, o.bias, 1))
    norm = (o.grad, o.bias, o.bias, 1e-5)
    assert_same(
        OPS.kron_matmul_norm(o.x, a, b, o.bias, *norm, packed),
        OPS.kron_matmul_norm(o.x, o.a, o.b, o.bias, *norm),
    )
    halved = packed_form(o.a / 2, o.b)
    q, k = OPS.kron_qkv(o.x, [a, halved[0]], [b, halved[1]], [o.bias, o.bias], [packed, halved[2]])
    assert_same(q, OPS.kron_matmul(o.x, o.a, o.b, o.bias, 0))
    assert_same(k, OPS.kron_matmul(o.x, o.a / 2, o.b, o.bias, 0))
    a2, b2, bias2 = second_pair(o.a, o.b)
    plain = OPS.kron_ffn(o.x, o.a, o.b, o.bias, a2, b2, bias2, 1, None, None, None, 0.0)
    second = packed_form(a2, b2)
    for pack1, pack2 in ((True, True), (True, False), (False, True)):
        first_of_call = (a, b, packed) if pack1 else (o.a, o.b, None)
        second_of_call = second if pack2 else (a2, b2, None)
        operands = (*first_of_call[:2], o.bias, *second_of_call[:2], bias2, 1, None, None, None, 0.0)
        assert_same(OPS.kron_ffn(o.x, *operands, first_of_call[2], second_of_call[2]), plain)


def test_a_batch_of_tokens_under_vmap() -> None:
    o = make(Case("k8-w1-small", 6), torch.float32)
    a, b, packed = packed_form(o.a, o.b)
    y = torch.func.vmap(lambda x: OPS.kron_matmul(x, a, b, o.bias, 0, packed))(o.x)
    assert_same(y, OPS.kron_matmul(o.x, o.a, o.b, o.bias, 0))
    with pytest.raises(ValueError, match="packed: expected factors shared by all samples of vmap"):
        torch.func.vmap(lambda bias: OPS.kron_matmul(o.x, a, b, bias, 0, packed))(torch.stack([o.bias, o.bias]))


def test_what_does_not_fit_is_an_error() -> None:
    o = make(Case("k8-w1-small", 5), torch.float32)
    other = make(Case("k8-w2-small", 5), torch.float32)
    packed = OPS.kron_pack(o.a, o.b)

    def call(packed: Tensor, dtype: torch.dtype = torch.float32) -> None:
        OPS.kron_matmul(o.x.to(dtype), o.a.to(dtype), o.b.to(dtype), None, 0, packed)

    level = backends.set_cpu_isa("amx")
    with pytest.raises(
        ValueError,
        match=rf"packed: expected what kron_pack made of factors a \(1, 8, 2\), b \(1, 96, 96\) in float32 at "
        rf"instruction-set level {level} on this machine, got those of a \(1, 2, 8\), b \(1, 96, 96\) in float32; "
        "make it again with optimize_for_inference",
    ):
        call(OPS.kron_pack(other.a, other.b))
    with pytest.raises(ValueError, match=r"in bfloat16 .* got those of .* in float32"):
        call(packed, torch.bfloat16)
    with pytest.raises(ValueError, match="got bytes that do not begin at a multiple of 64"):
        call(torch.cat([packed.new_empty(8), packed])[8:])
    with pytest.raises(ValueError, match=r"got \d+ bytes, not \d+"):
        call(packed[:-64].clone())
    with pytest.raises(ValueError, match="got bytes of another origin"):
        call(torch.zeros_like(packed))
    with pytest.raises(ValueError, match="packed: expected a contiguous uint8 tensor"):
        call(packed.float())
    if level != "portable":
        backends.set_cpu_isa("portable")
        try:
            with pytest.raises(ValueError, match="level portable on this machine, got the layout of another level"):
                call(packed)
        finally:
            backends.set_cpu_isa("amx")


def test_the_reference_takes_no_packed_factors() -> None:
    o = make(Case("odd", 5), torch.float32)
    packed = OPS.kron_pack(o.a, o.b)
    with pytest.raises(ValueError, match="packed: expected none on a backend that reads plain factors"):
        registry.REFERENCES["kron_matmul"](o.x, o.a, o.b, None, 0, packed)
    nothing = packed.new_empty(0)  # what kron_pack returns there
    torch.testing.assert_close(
        registry.REFERENCES["kron_matmul"](o.x, o.a, o.b, None, 0, nothing),
        OPS.kron_matmul(o.x, o.a, o.b, None, 0),
    )
