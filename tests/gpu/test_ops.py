"""Every op on a GPU through the public functions, over the table of shapes, against fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kron_kernels import AddNorm, kron_addmm, kron_embedding, kron_ffn, kron_matmul, kron_matmul_norm, kron_qkv
from kron_kernels.backends import select
from kron_kernels.backends.devices import arch
from kron_kernels.schemas import reference
from kron_kernels.schemas.product import Product
from kron_kernels.testing.accuracy import assert_accurate, backward_case, forward_case
from kron_kernels.testing.shapes import CASES, DTYPES, SHAPES, Case, make, make_operands
from tests.ops import block_cases
from tests.ops.block_cases import FFN_CASES, FfnCase, ffn_case, ffn_gradients

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

T = TypeVar("T")
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By the kernels for many tokens, with TMA and wgmma on sm_90: whole tiles, ragged ones, more than one wave.
LARGE = tuple(Case(shape, tokens) for shape in ("k8-attention", "k21-attention") for tokens in (4161, 32805))


def with_dtypes(table: Sequence[T]) -> list[tuple[T, torch.dtype]]:
    """Each case in each dtype; in float16, whose kernels are those of bfloat16, every third: compiling takes time."""
    every = ((index, case, dtype) for index, case in enumerate(table) for dtype in GPU_DTYPES)
    return [(case, dtype) for index, case, dtype in every if dtype is not torch.float16 or index % 3 == 0]


def name_of(value: object) -> str:
    return str(getattr(value, "id", value))


def moved(tensor: Tensor) -> Tensor:
    """The tensor on the GPU with its strides and its place in the storage, which ``to`` would change."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.clone().to("cuda").as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [moved(tensor).requires_grad_() for tensor in tensors]


@contextlib.contextmanager
def unsupported(backend: str, op: str, factors: Sequence[Tensor], dtype: torch.dtype, tokens: int) -> Iterator[None]:
    """Inside, a call; where the backend says that it does not take it, it has to raise, and the test is skipped."""
    products = tuple(Product.of(a, b) for a, b in zip(factors[::2], factors[1::2], strict=True))
    ops = (op.removesuffix("_backward"), op) if op.endswith("_backward") else (op,)
    reasons = [select.unsupported_reason(backend, each, products, dtype, tokens, arch(0)) for each in ops]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        yield
        return
    with pytest.raises(RuntimeError, match=f"backend '{backend}', requested by name, does not take"):
        yield
    pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize(("case", "dtype"), with_dtypes((*CASES, *LARGE)), ids=name_of)
def test_matmul(case: Case, dtype: torch.dtype, backend: str) -> None:
    o, same_dtype, oracle = forward_case(case, dtype)
    x, a, b = map(moved, (o.x, o.a, o.b))
    bias = None if o.bias is None else moved(o.bias)
    with unsupported(backend, "kron_matmul", (a, b), dtype, case.tokens):
        assert_accurate(kron_matmul(x, a, b, bias, backend=backend).cpu(), same_dtype, oracle)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes((*CASES, LARGE[0])), ids=name_of)
def test_matmul_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    o, same_dtype, oracles = backward_case(case, dtype)
    leaves = leaves_of(o.x, o.a, o.b, torch.zeros(o.grad.shape[-1], dtype=dtype))
    with unsupported(backend, "kron_matmul_backward", (o.a, o.b), dtype, case.tokens):
        found = torch.autograd.grad(kron_matmul(*leaves, backend=backend), leaves, moved(o.grad))
        for actual, same, oracle, name in zip(found, same_dtype, oracles, ("dx", "da", "db", "dbias"), strict=True):
            assert_accurate(actual.cpu(), same, oracle, name)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_activations(activation: str, dtype: torch.dtype, backend: str) -> None:
    o, same_dtype, oracle = forward_case(Case("k8-w1-small", 17), dtype, activation)
    with unsupported(backend, "kron_matmul", (o.a, o.b), dtype, 17):
        y = kron_matmul(*map(moved, (o.x, o.a, o.b, o.bias)), activation=activation, backend=backend)
        assert_accurate(y.cpu(), same_dtype, oracle)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["k8-attention-small", "k8-w1-small", "balanced"])
def test_addmm(shape: str, dtype: torch.dtype, backend: str) -> None:
    o = make(Case(shape, 17), dtype)
    operands = (o.grad, o.x, o.a, o.b)
    oracle = reference.kron_addmm(*(tensor.double() for tensor in operands), 0.5)
    with unsupported(backend, "kron_addmm", (o.a, o.b), dtype, 17):
        y = kron_addmm(*map(moved, operands), alpha=0.5, backend=backend)
        assert_accurate(y.cpu(), reference.kron_addmm(*operands, 0.5), oracle)


LARGE_FFN = (FfnCase("k8", 4161, norm=True), FfnCase("k8", 8455))


@pytest.mark.parametrize(("case", "dtype"), with_dtypes((*FFN_CASES, *LARGE_FFN)), ids=name_of)
def test_ffn(case: FfnCase, dtype: torch.dtype, backend: str) -> None:
    o, same_dtype, oracle = ffn_case(case, dtype)
    norm = AddNorm(*map(moved, o.norm[:3]), o.norm[3]) if case.norm else None
    with unsupported(backend, "kron_ffn", (o.a1, o.b1, o.a2, o.b2), dtype, case.tokens):
        y = kron_ffn(*map(moved, o.layers), activation=case.activation, norm=norm, backend=backend)
        assert_accurate(y.cpu(), same_dtype, oracle)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes([case for case in FFN_CASES if not case.norm]), ids=name_of)
def test_ffn_gradients(case: FfnCase, dtype: torch.dtype, backend: str) -> None:
    o, _, _ = ffn_case(case, dtype)
    leaves = leaves_of(*o.layers)
    with unsupported(backend, "kron_ffn_backward", (o.a1, o.b1, o.a2, o.b2), dtype, case.tokens):
        y = kron_ffn(*leaves, activation=case.activation, backend=backend)
        found = torch.autograd.grad(y, leaves, moved(o.grad))
        for index, values in enumerate(zip(found, *ffn_gradients(case, dtype), strict=True)):
            assert_accurate(values[0].cpu(), *values[1:], f"gradient {index}")


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 4161])
@pytest.mark.parametrize("shape", ["k8-attention-small", "k21-attention-small", "balanced", "odd"])
def test_qkv(shape: str, tokens: int, dtype: torch.dtype, backend: str) -> None:
    each = [make(Case(shape, tokens), dtype, seed) for seed in range(3)]
    x = each[0].x
    factors = [tensor for o in each for tensor in (o.a, o.b)]
    with unsupported(backend, "kron_qkv", factors, dtype, tokens):
        on_device = [[moved(getattr(o, name)) for o in each] for name in ("a", "b", "bias")]
        for actual, o in zip(kron_qkv(moved(x), *on_device, backend=backend), each, strict=True):
            d = o.double()
            oracle = reference.kron_matmul(x.double(), d.a, d.b, d.bias)
            assert_accurate(actual.cpu(), reference.kron_matmul(x, o.a, o.b, o.bias), oracle)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["k8-attention-small", "balanced", "odd-wide"])
def test_matmul_norm(shape: str, dtype: torch.dtype, backend: str) -> None:
    o = make_operands(SHAPES[shape], 17, dtype=dtype)
    operands = (o.x, o.a, o.b, o.bias, *block_cases.norm_operands(o.grad, dtype))
    oracle = reference.kron_matmul_norm(*(tensor.double() for tensor in operands), 1e-5)
    with unsupported(backend, "kron_matmul_norm", (o.a, o.b), dtype, 17):
        d = [moved(tensor) for tensor in operands]
        y = kron_matmul_norm(*d[:4], norm=AddNorm(*d[4:], 1e-5), backend=backend)
        assert_accurate(y.cpu(), reference.kron_matmul_norm(*operands, 1e-5), oracle)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(50, 12, 8), (50, 6, 16), (3, 5, 3)], ids=str)
def test_embedding_and_its_gradients(sizes: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    rows, p, k = sizes
    width, tokens = p * k, 40
    indices = (torch.randint(0, rows, (tokens,)), torch.arange(tokens) % 20, torch.arange(tokens) % 2)
    shapes = ((1, rows, p), (1, 1, k), (20, width), (2, width), (width,), (width,), (tokens, width))
    values = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]

    def by(move: Callable[[Tensor], Tensor], name: str) -> list[Tensor]:
        leaves = [move(value).detach().requires_grad_() for value in values[:-1]]
        ids, position_ids, type_ids = (index.to(leaves[0].device) for index in indices)
        names = ("position_weight", "type_weight", "norm_weight", "norm_bias")
        added = dict(zip(names, leaves[2:], strict=True), position_ids=position_ids, type_ids=type_ids)
        y = kron_embedding(ids, *leaves[:2], **added, backend=name)
        return [y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y, leaves, move(values[-1])))]

    with unsupported(backend, "kron_embedding_backward", values[:2], dtype, tokens):
        found, same = by(moved, backend), by(lambda value: value, "reference")
        for index, results in enumerate(zip(found, same, by(Tensor.double, "reference"), strict=True)):
            assert_accurate(*results, f"result {index}")


def test_automatic_choice_is_right_everywhere() -> None:
    for case in CASES:
        for dtype in DTYPES:
            o, same_dtype, oracle = forward_case(case, dtype)
            bias = None if o.bias is None else moved(o.bias)
            y = kron_matmul(moved(o.x), moved(o.a), moved(o.b), bias)
            assert_accurate(y.cpu(), same_dtype, oracle, f"{case.id} {dtype}")


def test_tf32_follows_torch(backend: str) -> None:
    """Rounded products only where torch's setting allows them."""
    o, same_dtype, oracle = forward_case(Case("k8-attention", 70), torch.float32)
    operands = list(map(moved, (o.x, o.a, o.b, o.bias)))
    torch.set_float32_matmul_precision("high")
    try:
        rounded = kron_matmul(*operands, backend=backend).cpu()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (rounded.double() - oracle).norm() / oracle.norm() < 2e-3
    with unsupported(backend, "kron_matmul", (o.a, o.b), torch.float32, 70):
        assert_accurate(kron_matmul(*operands, backend=backend).cpu(), same_dtype, oracle)
