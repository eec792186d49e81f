"""The fit of a table whose rows are read unequally often: optimal under the weights, sane where they are zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.factorize import KronFactors, nearest_kronecker, nearest_rows
from kron_kernels.schemas.reference import kron_weight


def table_and_weights(rows: int = 60, dim: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, dim, dtype=torch.float64), torch.logspace(3, -2, rows, dtype=torch.float64)


def weighted_error(table: Tensor, factors: KronFactors, weights: Tensor) -> float:
    lost = (table - kron_weight(factors.a, factors.b)).square().sum(1)
    return float(((weights * lost).sum() / (weights * table.square().sum(1)).sum()).sqrt())


@pytest.mark.parametrize("terms", [1, 2])
def test_optimal_under_the_weights(terms: int) -> None:
    table, weights = table_and_weights()
    factors, plain = nearest_rows(table, 4, terms, weights), nearest_kronecker(table, (60, 3), terms)
    assert factors.a.shape == (terms, 60, 3)
    assert factors.b.shape == (terms, 1, 4)
    assert weighted_error(table, factors, weights) < 0.97 * weighted_error(table, plain, weights)
    assert factors.weighted_error == pytest.approx(weighted_error(table, factors, weights))
    assert factors.relative_error > plain.relative_error
    a, b = factors.a.requires_grad_(), factors.b.requires_grad_()
    loss = (weights * (table - kron_weight(a, b)).square().sum(1)).sum() / weights.sum()
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert gradient.abs().max() < 1e-12


def test_a_row_that_is_never_read_gets_its_own_fit() -> None:
    table, weights = table_and_weights()
    weights[5:9] = 0
    factors = nearest_rows(table, 4, 1, weights)
    basis = factors.b[0, 0] / factors.b.norm()
    best = (table[5:9].view(4, 3, 4) @ basis)[..., None] * basis
    torch.testing.assert_close(kron_weight(factors.a, factors.b)[5:9], best.flatten(1))


def test_equal_weights_give_the_plain_factors() -> None:
    table, _ = table_and_weights()
    plain, same = nearest_kronecker(table, (60, 3), 2), nearest_rows(table, 4, 2, torch.full((60,), 7))
    torch.testing.assert_close(same.a, plain.a)
    torch.testing.assert_close(same.b, plain.b)
    assert same.weighted_error == pytest.approx(plain.relative_error)


def test_full_terms_are_exact_and_low_precision_stays_low() -> None:
    table, weights = table_and_weights()
    exact = nearest_rows(table, 4, 4, weights)
    torch.testing.assert_close(kron_weight(exact.a, exact.b), table)
    low = nearest_rows(table.bfloat16(), 4, 1, weights)
    assert low.a.dtype == low.b.dtype == torch.bfloat16
    assert weighted_error(table, low, weights) < 1.02 * weighted_error(
        table, nearest_rows(table, 4, 1, weights), weights
    )


def test_zero_table() -> None:
    factors = nearest_rows(torch.zeros(6, 4), 2, 1, torch.ones(6))
    assert not factors.a.any()
    assert factors.weighted_error == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"factor": 4}, ValueError, r"a_shape: expected \(m1, n1\) that divides \(1, 6\), got \(1, 4\)"),
        ({"factor": 0}, ValueError, "factor: expected a positive int, got 0"),
        ({"terms": 4}, ValueError, r"terms: expected at most .* = 3, got 4"),
        ({"row_weights": [1.0] * 8}, TypeError, "row_weights: expected a torch.Tensor of numbers, got list"),
        ({"row_weights": torch.ones(7)}, ValueError, r"row_weights: expected shape \(8,\), got \(7,\)"),
        ({"row_weights": -torch.ones(8)}, ValueError, "row_weights: expected finite values of at least 0"),
        ({"row_weights": torch.full((8,), torch.inf)}, ValueError, "row_weights: expected finite values of at least 0"),
        ({"row_weights": torch.zeros(8)}, ValueError, "row_weights: .* not all of them 0"),
        ({"weight": torch.ones(8)}, ValueError, "weight: expected a non-empty matrix"),
    ],
)
def test_bad_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"weight": torch.ones(8, 6), "factor": 3, "terms": 1, "row_weights": torch.ones(8), **arguments}
    with pytest.raises(error, match=message):
        nearest_rows(**given)  # type: ignore[arg-type]
