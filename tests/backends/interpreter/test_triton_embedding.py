"""The embedding's kernel under Triton's interpreter, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kron_kernels.backends.triton.embedding import indices, kron_embedding
from kron_kernels.schemas import reference
from tests import cases
from tests.ops import block_cases

DTYPES = (torch.float32, torch.float16)
# A row longer than 4096 values: a program holds one.
SHAPES = (*block_cases.EMBEDDINGS, (1, 700, 6, True))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("terms", "p", "k", "whole"), SHAPES)
def test_accuracy(terms: int, p: int, k: int, whole: bool, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = block_cases.embedding_case(terms, p, k, whole, dtype)
    y = kron_embedding(*o.operands)
    assert y.dtype is dtype
    assert y.is_contiguous()
    cases.assert_accurate(y, same_dtype, oracle)


def columns_apart(table: Tensor) -> Tensor:
    return torch.stack([table, torch.full_like(table, float("nan"))], -1)[..., 0]


def rows_apart(table: Tensor) -> Tensor:
    return torch.cat([table, torch.full_like(table, float("nan"))], -1)[..., : table.shape[-1]]


def shifted(table: Tensor) -> Tensor:
    return torch.cat([table.new_zeros(1), table.reshape(-1)])[1:].view(table.shape)


@pytest.mark.parametrize("layout", [lambda t: t.mT.contiguous().mT, columns_apart, rows_apart, shifted])
def test_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    o, _, _ = block_cases.embedding_case(2, 12, 16, True, torch.float32)
    ids, a, b, position_ids, positions, type_ids, types, weight, bias, eps = o.operands
    y = kron_embedding(
        ids, layout(a), layout(b), position_ids, layout(positions), type_ids, layout(types),
        layout(weight[None])[0], layout(bias[None])[0], eps,
    )  # fmt: skip
    assert torch.equal(y, kron_embedding(*o.operands))


IDS = torch.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "in_place"),
    [
        (lambda ids: ids, True),
        (lambda ids: ids.int(), True),
        (lambda ids: ids[0, 0, 0], True),
        (lambda ids: ids[0, 0], True),
        (lambda ids: ids[0], True),
        (lambda ids: ids[:, :1, :1], True),
        (lambda ids: ids[:, :, :1], True),
        (lambda ids: ids[:1, :1, :1], True),
        (lambda ids: ids[:, :1], False),
        (lambda ids: ids[:1, :, :1], False),
        (lambda ids: ids.mT.contiguous().mT, False),
        (lambda ids: ids.transpose(0, 1).contiguous().transpose(0, 1), False),
        (lambda ids: torch.stack([ids, -ids], -1)[..., 0], True),
    ],
)
def test_indices_of_any_shape_and_strides(change: Callable[[Tensor], Tensor], in_place: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, table = (torch.randn(size, generator=generator) for size in ((1, 24, 3), (1, 1, 2), (24, 6)))
    ids = change(IDS)
    every = torch.broadcast_tensors(IDS, ids)[1]
    y = kron_embedding(IDS, a, b, ids, table, None, None, None, None, 0.0)
    assert torch.equal(y, reference.kron_embedding(IDS, a, b, every, table))
    if ids.shape == IDS.shape:
        y = kron_embedding(ids, a, b, None, None, ids, table, None, None, 0.0)
        assert torch.equal(y, reference.kron_embedding(ids, a, b, ids, table))
    assert (indices(ids, IDS.shape).ids.data_ptr() == ids.data_ptr()) == in_place


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("index", [-1, 50, 2**40])
def test_an_index_outside_its_table_gives_nan_and_reads_nothing(place: int, index: int) -> None:
    o = block_cases.make_embedding(1, 12, 8, True, torch.float32)
    operands = list(o.operands)
    operands[place] = operands[place].expand(3, 21).to(torch.int64).clone()
    operands[place][1, 4] = index
    y = kron_embedding(*operands)
    assert y[1, 4].isnan().all()
    expected = kron_embedding(*o.operands)
    expected[1, 4] = float("nan")
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (1, 1, 1)])
def test_one_token_and_none(shape: tuple[int, ...]) -> None:
    o = block_cases.make_embedding(1, 12, 8, True, torch.float32)
    _, a, b, _, positions, _, types, *norm = o.operands
    ids = torch.full(shape, 3, dtype=torch.int32)
    arguments = (ids, a, b, ids, positions, torch.zeros((), dtype=torch.int64), types, *norm)
    torch.testing.assert_close(kron_embedding(*arguments), reference.kron_embedding(*arguments))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_token(value: float) -> None:
    o = block_cases.make_embedding(1, 12, 8, True, torch.float32)
    ids, a, *rest = o.operands
    plain = kron_embedding(ids, a, *rest)
    a = a.clone()
    a[0, ids[1, 2], 3] = value
    y = kron_embedding(ids, a, *rest)
    same = ids == ids[1, 2]
    assert y[same].isnan().all()
    assert torch.equal(y[~same], plain[~same])
