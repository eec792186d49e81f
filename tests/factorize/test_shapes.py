"""Costs of factor shapes: multiply-adds of both contraction orders, parameters, operations."""

from __future__ import annotations

import pytest

from kron_kernels.factorize import FactorShape, factor_shape, order_cost


# Multiply-adds a token of the products of KroneckerBERT, (cheaper, dearer).
@pytest.mark.parametrize(
    ("sizes", "cheaper", "dearer"),
    [
        ((384, 384, 2, 2), 296_448, 296_448),
        ((8, 2, 384, 384), 301_056, 1_185_792),
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
    # B first, for each of 3 terms 4 * 2 inner products of length 2; then 6 * 2 of length 3 * 4
    assert factor_shape(12, 8, (6, 4), 3).flops == 3 * 4 * 2 * 3 + 12 * 23
    with pytest.raises(ValueError, match=r"a_shape: expected \(m1, n1\) that divides \(768, 768\), got \(5, 2\)"):
        factor_shape(768, 768, (5, 2))
