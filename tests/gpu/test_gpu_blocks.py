"""Feed-forward blocks, projections of one input, embeddings, add and norm on a GPU, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kron_kernels import AddNorm, kron_embedding, kron_ffn, kron_matmul_norm, kron_qkv
from kron_kernels.schemas import reference
from tests.cases import SHAPES, Case, assert_accurate, make, make_operands
from tests.gpu.gpu_support import DTYPES, REHEARSED, moved, name_of, refused, with_dtypes
from tests.ops import block_cases
from tests.ops.block_cases import FFN_CASES, FfnCase, ffn_case, ffn_gradients

pytestmark = pytest.mark.gpu

_FFN = [FfnCase("k8", 5), FfnCase("odd", 2, norm=True)] if REHEARSED else list(FFN_CASES)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(_FFN), ids=name_of)
def test_ffn(case: FfnCase, dtype: torch.dtype, device: str, backend: str) -> None:
    o, same_dtype, oracle = ffn_case(case, dtype)
    layers = [moved(tensor, device) for tensor in o.layers]
    norm = AddNorm(*(moved(tensor, device) for tensor in o.norm[:3]), o.norm[3]) if case.norm else None
    with refused(backend, "kron_ffn", (o.a1, o.b1, o.a2, o.b2), dtype, case.tokens):
        y = kron_ffn(*layers, activation=case.activation, norm=norm, backend=backend)
        assert_accurate(y.cpu(), same_dtype, oracle)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes([case for case in _FFN if not case.norm]), ids=name_of)
def test_ffn_gradients(case: FfnCase, dtype: torch.dtype, device: str, backend: str) -> None:
    o, _, _ = ffn_case(case, dtype)
    same_dtype, oracles = ffn_gradients(case, dtype)
    with refused(backend, "kron_ffn_backward", (o.a1, o.b1, o.a2, o.b2), dtype, case.tokens):
        leaves = [moved(tensor, device).requires_grad_() for tensor in o.layers]
        y = kron_ffn(*leaves, activation=case.activation, backend=backend)
        found = torch.autograd.grad(y, leaves, moved(o.grad, device))
        for index, (actual, same, oracle) in enumerate(zip(found, same_dtype, oracles, strict=True)):
            assert_accurate(actual.cpu(), same, oracle, f"gradient {index}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["k8-attention-small", "k21-attention-small", "balanced", "odd"])
def test_qkv(shape: str, dtype: torch.dtype, device: str, backend: str) -> None:
    each = [make(Case(shape, 17), dtype, seed) for seed in range(3)]
    x = each[0].x
    on_device = [[moved(tensor, device) for tensor in (o.a, o.b, o.bias) if tensor is not None] for o in each]
    factors = tuple(tensor for o in each for tensor in (o.a, o.b))
    with refused(backend, "kron_qkv", factors, dtype, 17):
        found = kron_qkv(moved(x, device), *map(list, zip(*on_device, strict=True)), backend=backend)
        for actual, o in zip(found, each, strict=True):
            same = reference.kron_matmul(x, o.a, o.b, o.bias)
            d = o.double()
            assert_accurate(actual.cpu(), same, reference.kron_matmul(x.double(), d.a, d.b, d.bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["k8-attention-small", "balanced", "odd-wide"])
def test_matmul_norm(shape: str, dtype: torch.dtype, device: str, backend: str) -> None:
    o = make_operands(SHAPES[shape], 17, dtype=dtype)
    norm = block_cases.norm_operands(o.grad, dtype)
    assert o.bias is not None

    def by(function: Callable[..., Tensor], convert: Callable[[Tensor], Tensor], *rest: object) -> Tensor:
        operands = [convert(tensor) for tensor in (o.x, o.a, o.b, o.bias)]
        return function(*operands, *(convert(tensor) for tensor in norm), *rest)

    with refused(backend, "kron_matmul_norm", (o.a, o.b), dtype, 17):
        d = [moved(tensor, device) for tensor in (o.x, o.a, o.b, o.bias)]
        y = kron_matmul_norm(*d, AddNorm(*(moved(tensor, device) for tensor in norm), 1e-5), backend=backend)
        same = by(reference.kron_matmul_norm, lambda tensor: tensor, 1e-5)
        assert_accurate(y.cpu(), same, by(reference.kron_matmul_norm, Tensor.double, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(50, 12, 8), (50, 6, 16), (3, 5, 3)], ids=str)
def test_embedding_and_its_gradients(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: str, backend: str
) -> None:
    rows, p, k = sizes
    generator = torch.Generator().manual_seed(1)
    width, tokens = p * k, 40
    ids = torch.randint(0, rows, (tokens,), generator=generator)
    positions, types = torch.arange(tokens) % 20, torch.arange(tokens) % 2
    shapes = ((1, rows, p), (1, 1, k), (20, width), (2, width), (width,), (width,), (tokens, width))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def by(where: str, convert: Callable[[Tensor], Tensor], name: str | None) -> list[Tensor]:
        leaves = [moved(convert(value), where).requires_grad_() for value in values[:-1]]
        a, b, position_weight, type_weight, weight, bias = leaves
        y = kron_embedding(
            ids.to(where),
            a,
            b,
            position_ids=positions.to(where),
            position_weight=position_weight,
            type_ids=types.to(where),
            type_weight=type_weight,
            norm_weight=weight,
            norm_bias=bias,
            backend=name,
        )
        gradients = torch.autograd.grad(y, leaves, moved(convert(values[-1]), where))
        return [y.detach().cpu(), *(gradient.cpu() for gradient in gradients)]

    with refused(backend, "kron_embedding_backward", tuple(values[:2]), dtype, tokens):
        found = by(device, lambda value: value, backend)
        same = by("cpu", lambda value: value, "reference")
        for index, (actual, torchs, oracle) in enumerate(
            zip(found, same, by("cpu", Tensor.double, "reference"), strict=True)
        ):
            assert_accurate(actual, torchs, oracle, f"result {index}")
