"""The factored embedding and its gradients by the Triton kernels, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kron_kernels.backends.base import Device
from kron_kernels.backends.triton import embedding_backward, implementations, row_tiles
from kron_kernels.schemas import reference
from kron_kernels.schemas.product import Product
from kron_kernels.testing.accuracy import assert_accurate
from tests.ops import block_cases
from tests.ops.block_cases import Embedding, embedding_case, embedding_gradients, make_embedding

OPS = implementations()
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, so that each takes several steps."""
    monkeypatch.setattr(embedding_backward, "device_of", lambda _: Device(80, 1, 166912))


def gradients(o: Embedding, needs: int = 63) -> tuple[Tensor, ...]:
    *operands, _bias, eps = o.operands
    return OPS["kron_embedding_backward"](o.grad, *operands, eps, needs)


def with_operands(o: Embedding, **changed: Tensor | None) -> Embedding:
    """With other operands, by their place: ``p3`` is the ids of positions, ``p5`` those of types."""
    operands = tuple(changed.get(f"p{place}", operand) for place, operand in enumerate(o.operands))
    return Embedding(operands, o.grad)


def check(o: Embedding) -> None:
    """Forward and every gradient, against the reference in the same dtype."""
    torch.testing.assert_close(OPS["kron_embedding"](*o.operands), reference.kron_embedding(*o.operands))
    *operands, _bias, eps = o.operands
    expected = reference.kron_embedding_backward(o.grad, *operands, eps)
    torch.testing.assert_close(gradients(o), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_smoke() -> None:
    check(make_embedding(1, 5, 3, True, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("terms", "p", "k", "whole"), [*block_cases.EMBEDDINGS, (1, 60, 64, True)])
def test_accuracy(terms: int, p: int, k: int, whole: bool, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = embedding_case(terms, p, k, whole, dtype)
    assert_accurate(OPS["kron_embedding"](*o.operands), same_dtype, oracle)
    every = zip(gradients(o), *embedding_gradients(terms, p, k, whole, dtype), strict=True)
    for index, (actual, same, want) in enumerate(every):
        if want is None:
            assert actual.shape == (0,)
        else:
            assert_accurate(actual, same, want, f"gradient {index}")


@pytest.mark.parametrize("needs", [0, *(1 << bit for bit in range(6)), 0b010011])
def test_only_the_gradients_needed(needs: int) -> None:
    o = make_embedding(1, 12, 8, True, torch.float32)
    for bit, (some, every) in enumerate(zip(gradients(o, needs), gradients(o), strict=True)):
        if needs >> bit & 1:
            torch.testing.assert_close(some, every)
        else:
            assert some.shape == (0,)


@pytest.mark.parametrize("places", [(7, 8), (3, 4), (5, 6), (3, 4, 7, 8)])
def test_some_of_the_tables(places: tuple[int, ...]) -> None:
    check(with_operands(make_embedding(2, 5, 3, True, torch.float32), **{f"p{place}": None for place in places}))


def positions() -> Iterator[Tensor]:
    yield torch.arange(21).expand(3, 21)
    yield torch.tensor([[4], [4], [29]])
    yield torch.arange(63).view(21, 3).T % 30
    yield torch.full((1, 1), 7, dtype=torch.int32)


@pytest.mark.parametrize("index", list(positions()), ids=lambda index: f"{tuple(index.shape)}-{index.stride()}")
def test_positions_of_any_shape_and_strides(index: Tensor) -> None:
    check(with_operands(make_embedding(1, 5, 3, True, torch.float32), p3=index))


def columns_apart(table: Tensor) -> Tensor:
    return torch.stack([table, torch.full_like(table, float("nan"))], -1)[..., 0]


@pytest.mark.parametrize("layout", [lambda t: t.mT.contiguous().mT, columns_apart])
def test_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    o = make_embedding(2, 12, 16, True, torch.float32)
    moved = {f"p{place}": layout(o.operands[place]) for place in (1, 2, 4, 6)}
    strided = with_operands(o, **moved, p7=layout(o.operands[7][None])[0])
    assert torch.equal(OPS["kron_embedding"](*strided.operands), OPS["kron_embedding"](*o.operands))
    strided = Embedding(strided.operands, layout(o.grad))
    assert all(torch.equal(*pair) for pair in zip(gradients(strided), gradients(o), strict=True))


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("index", [-1, 2**40])
def test_an_index_outside_its_table_gives_nan_and_moves_nothing(place: int, index: int) -> None:
    o = make_embedding(1, 12, 8, True, torch.float32)
    ids = o.operands[place].expand(3, 21).to(torch.int64).clone()
    ids[1, 4] = index
    wrong = with_operands(o, **{f"p{place}": ids})
    y = OPS["kron_embedding"](*wrong.operands)
    expected = OPS["kron_embedding"](*o.operands)
    expected[1, 4] = float("nan")
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    grad = o.grad.clone()
    grad[1, 4] = 0
    for one, other in zip(gradients(wrong), gradients(Embedding(o.operands, grad)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.quick
def test_what_no_kernel_takes() -> None:
    def reason(p: int, k: int, gradient: bool, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return row_tiles.embedding_unsupported_reason(Product(1, 9, p, 1, k), dtype, gradient)

    assert reason(96, 8, True) is None
    assert reason(96, 8, False, torch.float64) == "the kernels compute float32, bfloat16 and float16, not torch.float64"
    assert reason(300, 20, False) is None
    assert reason(300, 20, True) == "a program cannot hold the sums of 1 terms for rows of 300 * 20 values"
    assert reason(300, 70, False) == "a program cannot hold rows of 300 * 70 values"
