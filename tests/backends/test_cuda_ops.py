"""The CUDA ops from Python down to the kernels, which an emulator runs on tensors of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels.backends import cuda
from kron_kernels.backends.base import Call
from kron_kernels.schemas import embedding, ffn, reference, registry
from kron_kernels.schemas.product import Product
from tests import cases
from tests.backends.cuda_emulated import emulated_ops
from tests.ops import block_cases

HALVES = (torch.bfloat16, torch.float16)
# One tiny factor, at most 16 x 16, and few tokens: the emulator runs every thread of every block.
_SMALL = (
    "k8-attention-small",
    "k8-w1-small",
    "k8-w2-small",
    "k21-attention-small",
    "odd",
    "row-b",
    "column-b",
    "scalar",
)
MM_CASES = (
    *(cases.Case(shape, tokens) for shape in _SMALL for tokens in (1, 5)),
    *(cases.Case("k8-w2-small", 17, 2, layout, bias=False) for layout in cases.LAYOUTS),
    *(cases.Case("k21-attention-small", 3, 1, layout) for layout in cases.LAYOUTS[1:]),
)


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


@pytest.fixture(autouse=True)
def emulated(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: "")
    monkeypatch.setattr(cuda, "_op", lambda name: getattr(ops, name).default)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", MM_CASES, ids=lambda case: case.id)
def test_kron_mm(case: cases.Case, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = cases.forward_case(case, dtype, "gelu")
    got = cuda.kron_matmul(o.x, o.a, o.b, o.bias, registry.ACTIVATION_CODES["gelu"])
    assert got.is_contiguous()
    cases.assert_accurate(got, same_dtype, oracle)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ["k8-attention-small", "k8-w1-small", "k8-w2-small"])
def test_kron_matmul_on_hopper(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRON_EMULATED_SM", "90")
    o, same_dtype, oracle = cases.forward_case(cases.Case(shape, 5), dtype)
    cases.assert_accurate(cuda.kron_matmul(o.x, o.a, o.b, o.bias, 0), same_dtype, oracle)
    y, same = cuda.kron_qkv(o.x, [o.a, o.a], [o.b, o.b], [o.bias, o.bias], [])
    cases.assert_accurate(y, same_dtype, oracle)
    assert torch.equal(y, same)


def test_float32_follows_the_setting_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    o = cases.make(cases.Case("k8-w1-small", 5))
    with pytest.raises(RuntimeError, match="compute float32 in TF32, which is off"):
        cuda.kron_matmul(o.x, o.a, o.b, o.bias, 0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    error = (cuda.kron_matmul(o.x, o.a, o.b, o.bias, 0) - cases.forward_oracle(o)).abs().max()
    assert error < 2e-3


def test_shapes_around_the_kernels() -> None:
    o = cases.make(cases.Case("odd", 6), torch.bfloat16)
    grid = o.x.view(2, 3, -1)
    y = cuda.kron_matmul(o.x, o.a[0], o.b[0], o.bias, 0)  # one pair of matrices
    assert torch.equal(cuda.kron_matmul(grid, o.a, o.b, o.bias, 0), y.view(2, 3, -1))
    assert torch.equal(cuda.kron_matmul(o.x[0], o.a, o.b, o.bias, 0), y[0])
    assert cuda.kron_matmul(grid[:0], o.a, o.b, o.bias, 0).shape == (0, 3, y.shape[-1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kron_matmul_add(dtype: torch.dtype) -> None:
    o = cases.make(cases.Case("k8-w1-small", 5, 2, "strided-rows"), dtype)
    oracle = o.grad.double() + 0.5 * cases.forward_oracle(cases.Operands(o.x, o.a, o.b, None, o.grad))
    same_dtype = reference.kron_addmm(o.grad, o.x, o.a, o.b, 0.5)
    cases.assert_accurate(cuda.kron_addmm(o.grad, o.x, o.a, o.b, 0.5), same_dtype, oracle)
    base = o.grad.contiguous()
    cuda.kron_addmm_(base, o.x, o.a, o.b, 0.5)
    cases.assert_accurate(base, same_dtype, oracle)
    with pytest.raises(ValueError, match="base: expected a contiguous tensor, got strides that are not"):
        cuda.kron_addmm_(o.grad, o.x, o.a, o.b, 0.5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [case for case in MM_CASES if case.terms > 1 or case.tokens > 1], ids=lambda c: c.id)
def test_kron_matmul_backward(case: cases.Case, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = cases.backward_case(case, dtype)
    got = cuda.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    for name, *tensors in zip(("dx", "da", "db", "dbias"), got, same_dtype, oracle, strict=True):
        cases.assert_accurate(*tensors, name)


def test_kron_matmul_backward_computes_what_is_needed() -> None:
    o = cases.make(cases.Case("odd", 6), torch.bfloat16)
    everything = cuda.kron_matmul_backward(o.grad, o.x, o.a, o.b, 0b1111)
    for index in range(4):
        some = cuda.kron_matmul_backward(o.grad, o.x, o.a, o.b, 1 << index)
        assert [tensor.numel() for i, tensor in enumerate(some) if i != index] == [0, 0, 0]
        assert torch.equal(some[index], everything[index])
    dx, *sums = cuda.kron_matmul_backward(o.grad[:0], o.x[:0], o.a, o.b, 0b1111)
    assert dx.shape == (0, 10)
    assert all(tensor.eq(0).all() for tensor in sums)


def test_kron_qkv_of_several_shapes() -> None:
    parts = [cases.make(cases.Case(name, 5), torch.bfloat16, seed) for seed, name in enumerate(("odd",) * 3)]
    x, last = parts[0].x, cases.make_operands(((4, 5), (3, 2)), 5, dtype=torch.bfloat16)
    parts.append(last)
    pairs = [[part.a for part in parts], [part.b for part in parts], [part.bias for part in parts]]
    for got, part in zip(cuda.kron_qkv(x, *pairs, []), parts, strict=True):
        mine = cases.Operands(x, part.a, part.b, part.bias, part.grad)
        same_dtype = reference.kron_matmul(x, part.a, part.b, part.bias)
        cases.assert_accurate(got, same_dtype, cases.forward_oracle(mine))


FFN_CASES = (
    *(block_cases.FfnCase("k8", tokens, norm=norm) for tokens, norm in ((1, False), (17, True))),
    *(block_cases.FfnCase("k8", 5, 1, layout, "silu") for layout in cases.LAYOUTS),
    *(block_cases.FfnCase("k8", 3, activation=name) for name in (None, "relu", "gelu_tanh")),
)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", FFN_CASES, ids=lambda case: case.id)
def test_kron_ffn(case: block_cases.FfnCase, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = block_cases.ffn_case(case, dtype)
    got = cuda.kron_ffn(*o.layers, registry.ACTIVATION_CODES[case.activation], *_norm(o, case.norm))
    cases.assert_accurate(got, same_dtype, oracle)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided-rows", "misaligned", "transposed-factors"])
def test_kron_ffn_backward(layout: str, dtype: torch.dtype) -> None:
    case = block_cases.FfnCase("k8", 17, layout=layout)
    o = block_cases.make_ffn(case, dtype)
    operands = (o.grad, *o.layers[:-1], registry.ACTIVATION_CODES[case.activation])
    got = cuda.kron_ffn_backward(*operands, 127)
    same_dtype, oracles = block_cases.ffn_gradients(case, dtype)
    for name, *tensors in zip(ffn.FFN_GRADIENTS, got, same_dtype, oracles, strict=True):
        cases.assert_accurate(*tensors, name)
    some = cuda.kron_ffn_backward(*operands, 0b0100010)
    assert [tensor.numel() > 0 for tensor in some] == [False, True, False, False, False, True, False]
    assert torch.equal(some[1], got[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kron_ffn_on_hopper(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRON_EMULATED_SM", "90")
    o, same_dtype, oracle = block_cases.ffn_case(block_cases.FfnCase("k8", 17), dtype)
    got = cuda.kron_ffn(*o.layers, registry.ACTIVATION_CODES["gelu"], *_norm(o, False))
    cases.assert_accurate(got, same_dtype, oracle)
    monkeypatch.delenv("KRON_EMULATED_SM")
    other = cuda.kron_ffn(*o.layers, registry.ACTIVATION_CODES["gelu"], *_norm(o, False))
    assert not torch.equal(got, other)  # by other kernels


def _norm(o: block_cases.Ffn, norm: bool) -> tuple[Any, ...]:
    return o.norm if norm else (None, None, None, 0.0)


def test_norm_that_the_kernel_leaves_follows_it() -> None:
    """Over more columns than the fused norm holds."""
    shape = (((2, 1), (16, 16)), ((1, 2), (400, 16)))
    first, second = (cases.make_operands(pair, 3, dtype=torch.bfloat16, seed=i) for i, pair in enumerate(shape))
    layers = (first.x, first.a, first.b, first.bias, second.a, second.b, second.bias)
    norm = block_cases.norm_operands(second.grad, torch.bfloat16)
    products = (Product(1, 2, 1, 16, 16), Product(1, 1, 2, 400, 16))
    assert cuda.unsupported_reason(Call("kron_ffn", products, torch.bfloat16, 3)) is None
    assert cuda._kernel_reason("kron_ffn_norm", products, torch.bfloat16, 3, 80) is not None
    got = cuda.kron_ffn(*layers, 1, *norm, 1e-5)

    def expected(*tensors: Tensor) -> Tensor:
        *operands, residual, weight, bias = tensors
        return F.layer_norm(residual + reference.kron_ffn(*operands, "gelu"), weight.shape, weight, bias, 1e-5)

    tensors = (*layers, *norm)
    cases.assert_accurate(got, expected(*tensors), expected(*(tensor.double() for tensor in tensors)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_with_torch_on_their_rows(dtype: torch.dtype) -> None:
    o = cases.make(cases.Case("k8-attention-small", 5), dtype)
    operands = (o.x, o.a, o.b, o.bias, *block_cases.norm_operands(o.grad, dtype))
    oracle = reference.kron_matmul_norm(*(tensor.double() for tensor in operands), 1e-5)
    cases.assert_accurate(cuda.kron_matmul_norm(*operands, 1e-5), reference.kron_matmul_norm(*operands, 1e-5), oracle)


def _table(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(size, generator=generator).to(dtype) for size in ((2, 11, 12), (2, 1, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_kron_embedding_broadcasts_indices_of_any_layout(dtype: torch.dtype) -> None:
    a, b = _table(dtype)
    ids = torch.randint(11, (5, 3)).T.int()
    positions = torch.arange(5).expand(3, 5)[:1]
    operands = (positions, torch.randn(5, 96).to(dtype), torch.ones(1, dtype=torch.int32), torch.randn(2, 96).to(dtype))
    norm = (torch.randn(96).to(dtype), torch.randn(96).to(dtype))
    double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in (ids, a, b, *operands, *norm)]
    got = cuda.kron_embedding(ids, a, b, *operands, *norm, 1e-5)
    expected = reference.kron_embedding(ids, a, b, *operands, *norm, 1e-5)
    cases.assert_accurate(got, expected, reference.kron_embedding(*double, 1e-5))
    assert cuda.kron_embedding(ids[:0], a, b, *[None] * 6, 0.0).shape == (0, 5, 96)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_kron_embedding_backward(dtype: torch.dtype, norm: bool) -> None:
    a, b = _table(dtype)
    ids, positions, types = torch.randint(11, (3, 5)), torch.arange(5).unsqueeze(0), torch.zeros(3, 5).long()
    tables = (positions, torch.randn(5, 96).to(dtype), types, torch.randn(2, 96).to(dtype))
    operands = (torch.randn(3, 5, 96).to(dtype), ids, a, b, *tables, torch.randn(96).to(dtype) if norm else None)
    double = [one.double() if one is not None and one.is_floating_point() else one for one in operands]
    got = cuda.kron_embedding_backward(*operands, 1e-5, 63)
    expected = reference.kron_embedding_backward(*operands, 1e-5)
    oracles = reference.kron_embedding_backward(*double, 1e-5)
    for name, *tensors in zip(embedding.EMBEDDING_GRADIENTS, got, expected, oracles, strict=True):
        cases.assert_accurate(*tensors, name)
    for bit, one in enumerate(got):
        some = cuda.kron_embedding_backward(*operands, 1e-5, 1 << bit)
        assert torch.equal(some[bit], one)
        assert not any(tensor.numel() for index, tensor in enumerate(some) if index != bit)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, a, b: cuda.kron_matmul(x[:, 1:], a, b, None, 0), r"x: expected .* got shape \(4, 9\)"),
        (lambda x, a, b: cuda.kron_matmul(x, a, b.half(), None, 0), "b: expected the dtype of x, got another dtype"),
        (lambda x, a, b: cuda.kron_matmul(x, a, b, x[0], 0), r"bias: expected .* \(21,\), got shape \(10,\)"),
        (lambda x, a, b: cuda.kron_matmul(x, a, b, None, 7), "activation: expected a code from 0 to 4, got 7"),
        (
            lambda x, a, b: cuda.kron_matmul(x.double(), a.double(), b.double(), None, 0),
            "backend 'cuda': kron_matmul of 4 tokens, 1 terms of 3x5 .x. 7x2: the CUDA kernels have no float64",
        ),
        (
            lambda x, a, b: cuda.kron_embedding(x, a, b[:, :1], *[None] * 6, 0.0),
            "ids: expected dtype int64 or int32, got another dtype",
        ),
        (
            lambda x, a, b: cuda.kron_embedding(torch.tensor([1, 3]), a, b[:, :1], *[None] * 6, 0.0),
            "kron_embedding of 2 tokens, 1 terms of 3x5 .x. 1x2: the launch failed with CUDA error 1, .*no row of its",
        ),
        (
            lambda x, a, b: cuda.kron_embedding_backward(x, torch.tensor([1]), a, b[:, :1], *[None] * 5, 0.0, 3),
            r"grad: expected the shape of ids with last dimension p \* k = 10, got shape \(4, 10\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    o = cases.make(cases.Case("odd", 4), torch.bfloat16)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
        call(o.x, o.a, o.b)


def test_unsupported_problems() -> None:
    def refusal(op: str, dtype: torch.dtype, sizes: tuple[int, ...], sm: int = 80) -> str | None:
        return cuda.unsupported_reason(Call(op, (Product(*sizes),), dtype, 4, sm))

    k8 = (1, 384, 384, 2, 2)
    assert all(refusal(op, torch.bfloat16, k8) is None for op in ("kron_matmul", "kron_addmm", "kron_qkv"))
    assert refusal("kron_embedding", torch.float32, (1, 30522, 96, 1, 8)) is None
    assert "float64" in str(refusal("kron_matmul", torch.float64, k8))
    assert refusal("kron_matmul", torch.int8, k8) == "the CUDA kernels have no int8"
    assert "no factor is tiny" in str(refusal("kron_matmul", torch.bfloat16, (1, 24, 24, 32, 32)))
    assert refusal("kron_matmul", torch.bfloat16, k8, 75) == "the kernels were built for 80+PTX 90a, not for sm_75"
    assert refusal("kron_matmul_norm", torch.bfloat16, k8) is None
    assert refusal("kron_pack", torch.bfloat16, k8) == "it has no kernel of kron_pack"
