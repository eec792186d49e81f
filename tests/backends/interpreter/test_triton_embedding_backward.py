"""Gradients of the embedding by the Triton kernel under its interpreter, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kron_kernels.backends.triton import embedding_backward, row_plan
from kron_kernels.backends.triton.embedding_backward import kron_embedding_backward
from kron_kernels.backends.triton.launch import Device
from kron_kernels.schemas import reference
from kron_kernels.schemas.embedding import EMBEDDING_GRADIENTS
from kron_kernels.schemas.product import Product
from tests import cases
from tests.ops import block_cases

ALL = 0b111111


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, so that each takes several steps."""
    monkeypatch.setattr(embedding_backward, "device_of", lambda _: Device(80, 1, 166912))


def gradients(o: block_cases.Embedding, needs: int = ALL) -> tuple[Tensor, ...]:
    *operands, _bias, eps = o.operands
    return kron_embedding_backward(o.grad, *operands, eps, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("terms", "p", "k", "whole"), [*block_cases.EMBEDDINGS, (1, 60, 64, True)])
def test_accuracy(terms: int, p: int, k: int, whole: bool, dtype: torch.dtype) -> None:
    o = block_cases.make_embedding(terms, p, k, whole, dtype)
    every = zip(
        EMBEDDING_GRADIENTS, gradients(o), *block_cases.embedding_gradients(terms, p, k, whole, dtype), strict=True
    )
    for name, actual, same_dtype, oracle in every:
        if oracle is None:
            assert actual.shape == (0,)
        else:
            assert actual.dtype is dtype
            assert actual.is_contiguous()
            cases.assert_accurate(actual, same_dtype, oracle, name)


@pytest.mark.parametrize("needs", [0, 0b1, 0b10, 0b100, 0b1000, 0b10000, 0b100000, 0b010011])
def test_only_the_gradients_asked_for(needs: int) -> None:
    o = block_cases.make_embedding(1, 12, 8, True, torch.float32)
    for bit, (some, every) in enumerate(zip(gradients(o, needs), gradients(o), strict=True)):
        if needs >> bit & 1:
            torch.testing.assert_close(some, every)
        else:
            assert some.shape == (0,)


def without(o: block_cases.Embedding, *places: int) -> block_cases.Embedding:
    operands = tuple(None if place in places else operand for place, operand in enumerate(o.operands))
    return block_cases.Embedding(operands, o.grad)


@pytest.mark.parametrize("places", [(7, 8), (3, 4), (5, 6), (3, 4, 7, 8), (5, 6, 7, 8)])
def test_some_of_the_tables(places: tuple[int, ...]) -> None:
    o = without(block_cases.make_embedding(2, 5, 3, True, torch.float32), *places)
    *operands, _, eps = o.operands
    expected = reference.kron_embedding_backward(o.grad, *operands, eps)
    torch.testing.assert_close(gradients(o), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
@pytest.mark.parametrize("whole", [True, False])
def test_types_of_few_rows_and_many(rows: int, whole: bool) -> None:
    o = block_cases.make_embedding(1, 5, 3, True, torch.float32)
    operands = list(o.operands)
    operands[5], operands[6] = torch.randint(rows, (3, 21)), torch.randn(rows, 15)
    o = block_cases.Embedding(tuple(operands), o.grad)
    o = o if whole else without(o, 7, 8)
    *operands, _, eps = o.operands
    expected = reference.kron_embedding_backward(o.grad, *operands, eps)
    torch.testing.assert_close(gradients(o), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(21),
        torch.arange(21).expand(3, 21),
        torch.arange(63).view(3, 21) % 30,
        torch.tensor([[4], [4], [29]]),
        torch.tensor(7),
        torch.full((1, 1), 7, dtype=torch.int32),
        torch.arange(63).view(21, 3).T % 30,
    ],
    ids=lambda positions: f"{tuple(positions.shape)}",
)
def test_positions_of_any_shape(positions: Tensor) -> None:
    o = block_cases.make_embedding(1, 5, 3, True, torch.float32)
    o = block_cases.Embedding((*o.operands[:3], positions, *o.operands[4:]), o.grad)
    *operands, _, eps = o.operands
    expected = reference.kron_embedding_backward(o.grad, *operands, eps)
    torch.testing.assert_close(gradients(o), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
        lambda t: torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]],
        lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    ],
)
def test_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    o = block_cases.make_embedding(2, 12, 16, True, torch.float32)
    ids, a, b, position_ids, positions, type_ids, types, weight, bias, eps = o.operands
    operands = (
        ids, layout(a), layout(b), position_ids, layout(positions), type_ids, layout(types),
        layout(weight[None])[0], bias, eps,
    )  # fmt: skip
    for one, other in zip(gradients(block_cases.Embedding(operands, layout(o.grad))), gradients(o), strict=True):
        assert torch.equal(one, other)
    expanded = block_cases.Embedding(o.operands, o.grad[:1, :1, :1].expand(o.grad.shape))
    whole = block_cases.Embedding(o.operands, expanded.grad.clone())
    for one, other in zip(gradients(expanded), gradients(whole), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("index", [-1, 50, 2**40])
def test_a_token_with_an_index_outside_its_table_moves_nothing(place: int, index: int) -> None:
    o = block_cases.make_embedding(1, 12, 8, True, torch.float32)
    operands = list(o.operands)
    operands[place] = operands[place].expand(3, 21).to(torch.int64).clone()
    operands[place][1, 4] = index
    actual = gradients(block_cases.Embedding(tuple(operands), o.grad.index_fill(0, torch.tensor(0), 1.0)))
    grad = o.grad.index_fill(0, torch.tensor(0), 1.0)
    grad[1, 4] = 0
    for one, other in zip(actual, gradients(block_cases.Embedding(o.operands, grad)), strict=True):
        torch.testing.assert_close(one, other)


def test_no_tokens_and_one() -> None:
    o = block_cases.make_embedding(1, 12, 8, True, torch.float32)
    _, a, b, _, positions, _, types, weight, bias, eps = o.operands
    for shape in ((0,), (2, 0), (), (1,)):
        ids = torch.full(shape, 1)
        one = block_cases.Embedding((ids, a, b, ids, positions, ids, types, weight, bias, eps), torch.randn(*shape, 96))
        expected = reference.kron_embedding_backward(one.grad, ids, a, b, ids, positions, ids, types, weight, eps)
        torch.testing.assert_close(gradients(one), expected, rtol=1e-4, atol=1e-4)


def test_what_no_kernel_takes() -> None:
    bert, half = Product(1, 30522, 96, 1, 8), torch.bfloat16
    assert row_plan.embedding_unsupported_reason(bert, half, True) is None
    assert row_plan.embedding_unsupported_reason(bert, torch.float64, False) == (
        "the kernels compute float32, bfloat16 and float16, not torch.float64"
    )
    long = Product(1, 9, 300, 1, 20)
    assert row_plan.embedding_unsupported_reason(long, half, False) is None
    assert row_plan.embedding_unsupported_reason(long, half, True) == (
        "a program cannot hold the sums of 1 terms for rows of 300 * 20 values"
    )
    assert row_plan.embedding_unsupported_reason(Product(1, 9, 300, 1, 70), half, False) == (
        "a program cannot hold rows of 300 * 70 values"
    )
