"""Costs and searches of factor shapes."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.factorize import (
    BertSize,
    FactorShape,
    ModelShapes,
    factor_shape,
    model_shapes,
    nearest_kronecker,
    order_cost,
    search_factor_shapes,
    search_model_shapes,
)


def k8() -> ModelShapes:
    return model_shapes(BertSize(), (384, 384), (8, 2), (2, 8), (30522, 96))


def k21() -> ModelShapes:
    return model_shapes(BertSize(), (384, 48), (16, 2), (2, 16), (30522, 48))


# Multiply-adds a token of the products of KroneckerBERT, (cheaper, dearer).
@pytest.mark.parametrize(
    ("sizes", "cheaper", "dearer"),
    [
        ((384, 384, 2, 2), 296_448, 296_448),
        ((8, 2, 384, 384), 301_056, 1_185_792),
        ((2, 8, 384, 384), 301_056, 1_185_792),
        ((384, 48, 2, 16), 38_400, 307_200),
        ((16, 2, 192, 384), 153_600, 1_191_936),
        ((2, 16, 384, 192), 153_600, 1_191_936),
    ],
)
def test_order_cost(sizes: tuple[int, int, int, int], cheaper: int, dearer: int) -> None:
    costs = order_cost(*sizes)
    assert (min(costs), max(costs)) == (cheaper, dearer)
    assert order_cost(*sizes, terms=3) == (3 * costs[0], 3 * costs[1])


def test_order_cost_counts_the_multiplications_of_each_order() -> None:
    m1, n1, m2, n2 = 5, 3, 2, 7
    b_first = n1 * n2 * m2 + m1 * n1 * m2  # X B^T, then A (X B^T)
    a_first = m1 * n1 * n2 + m1 * n2 * m2  # A X, then (A X) B^T
    assert order_cost(m1, n1, m2, n2) == (b_first, a_first)


def test_factor_shape() -> None:
    assert factor_shape(768, 3072, (2, 8), 3) == FactorShape((2, 8), (384, 384), 3, 3 * 147_472, 3 * 301_056)
    with pytest.raises(ValueError, match=r"a_shape: expected \(m1, n1\) that divides \(768, 768\), got \(5, 2\)"):
        factor_shape(768, 768, (5, 2))


def test_finds_the_planted_shape() -> None:
    weight = torch.kron(torch.randn(6, 4), torch.randn(2, 5)) + 0.01 * torch.randn(12, 20)
    shapes = search_factor_shapes(12, 20, weight=weight, max_params=60)
    assert (shapes[0].a, shapes[0].b) == ((6, 4), (2, 5))
    errors = [shape.relative_error for shape in shapes]
    assert errors == sorted(errors)
    assert all(shape.params <= 60 for shape in shapes)


def test_errors_are_those_of_the_factors() -> None:
    weight = torch.randn(12, 20)
    shapes = search_factor_shapes(12, 20, weight=weight, terms=(1, 2, 40), max_macs=150, limit=None)
    assert {shape.terms for shape in shapes} == {1, 2}
    for shape in shapes:
        assert shape.macs <= 150
        assert shape.params < 240
        factors = nearest_kronecker(weight, shape.a, shape.terms)
        assert shape.relative_error == pytest.approx(factors.relative_error, abs=1e-6)


def test_without_a_weight_most_parameters_come_first_then_fewest_multiply_adds() -> None:
    shapes = search_factor_shapes(16, 16, max_params=70, limit=None)
    assert all(shape.relative_error is None for shape in shapes)
    keys = [(-shape.params, shape.macs) for shape in shapes]
    assert keys == sorted(keys)
    assert shapes[0].params <= 70
    assert len(search_factor_shapes(16, 16, max_params=70, limit=3)) == 3
    # all pairs of divisors but 1 x 1 and 16 x 16, which save nothing
    assert len(search_factor_shapes(16, 16, limit=None)) == 25 - 2


def test_weighted_search_and_progress() -> None:
    weight, x = torch.randn(8, 12), torch.randn(400, 12) * torch.logspace(0, -2, 12)
    moment, calls = x.T @ x / 400, []
    shapes = search_factor_shapes(
        8, 12, weight=weight, input_moment=moment, max_params=40, limit=None, progress=lambda *call: calls.append(call)
    )
    errors = [shape.weighted_error for shape in shapes]
    assert errors == sorted(errors)
    assert [call[:2] for call in calls] == [(done, len(shapes)) for done in range(1, len(shapes) + 1)]
    again = nearest_kronecker(weight, shapes[0].a, input_moment=moment, rounds=5)
    assert shapes[0].weighted_error == pytest.approx(again.weighted_error)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"m": 0}, ValueError, "m: expected a positive int, got 0"),
        ({"n": 2.0}, TypeError, "n: expected a positive int, got 2.0"),
        ({"terms": (1, 0)}, ValueError, "terms: expected a positive int, got 0"),
        ({"weight": torch.ones(6, 8)}, ValueError, r"weight: expected shape \(8, 6\), got \(6, 8\)"),
        ({"input_moment": torch.eye(6)}, ValueError, "input_moment: expected together with weight, got weight=None"),
        (
            {"weight": torch.ones(8, 6), "input_moment": torch.eye(8)},
            ValueError,
            r"input_moment: expected shape \(6, 6\), got \(8, 8\)",
        ),
    ],
)
def test_bad_search(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search_factor_shapes(**{"m": 8, "n": 6, **arguments})  # type: ignore[arg-type]


def test_counts_of_kroneckerbert() -> None:
    """Parameters and FLOPs at 128 tokens of the published shapes (Tahaei et al., NAACL 2022, table 1)."""
    assert BertSize().dense_params() == 109_482_240
    assert BertSize(pooler=False).dense_params() == 108_891_648
    assert k8().params == 14_654_216
    assert k21().params == 5_228_272
    assert k8().params - (BertSize().kept_params() - BertSize(pooler=False).kept_params()) == 14_063_624
    assert k8().macs == 12 * 1_787_904
    assert round(128 * k8().flops / 1e9, 3) == 5.475
    assert round(128 * k21().flops / 1e9, 3) == 1.403
    assert round(k8().compression, 2) == 7.47


def test_search_model_shapes() -> None:
    found = search_model_shapes(21, tolerance=0.01, limit=None)
    assert any(
        (shapes.attention.a, shapes.ffn_in.a, shapes.embedding.a) == ((384, 48), (16, 2), (30522, 48))
        for shapes in found
    )
    assert [shapes.macs for shapes in found] == sorted(shapes.macs for shapes in found)
    for shapes in found:
        assert shapes.compression == pytest.approx(21, rel=0.01)
        assert shapes.ffn_out.a == shapes.ffn_in.a[::-1]
    assert search_model_shapes(21, BertSize(hidden=7, intermediate=7), tolerance=0.01) == []


def test_bad_model_search() -> None:
    with pytest.raises(ValueError, match=r"target_compression: expected a number above 1, got 0\.5"):
        search_model_shapes(0.5)
    with pytest.raises(ValueError, match="hidden: expected a positive int, got 0"):
        BertSize(hidden=0)
