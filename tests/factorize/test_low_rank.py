"""Low-rank factors and principal rows: the optimum, with and without weights, against its own definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.factorize.low_rank import nearest_low_rank, output_directions, principal_energies, principal_rows
from kron_kernels.factorize.weighted import regularised
from tests.factorize.test_weighted import uneven_inputs


def random_weight(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a matrix whose singular values fall."""
    return (torch.randn(m, n) * torch.logspace(0, -1, n)).to(dtype)


@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9)])
@pytest.mark.parametrize("with_moment", [False, True])
def test_error_is_the_least_that_a_rank_allows(m: int, n: int, with_moment: bool) -> None:
    weight, x = random_weight(m, n), uneven_inputs(300, n).double()
    moment = x.T @ x / len(x) if with_moment else None
    factors = nearest_low_rank(weight, 3, input_moment=moment)
    assert (factors.u.shape, factors.v.shape, factors.u.dtype) == ((3, m), (3, n), torch.float64)
    torch.testing.assert_close(factors.u.norm(dim=1), factors.v.norm(dim=1))
    # Eckart and Young: what is left are the singular values beyond the rank, of W times any root of C.
    root = torch.eye(n, dtype=torch.float64)
    if moment is not None:
        values, vectors = torch.linalg.eigh(regularised(moment))
        root = vectors * values.sqrt() @ vectors.T
    residual = weight - factors.u.T @ factors.v
    singular = torch.linalg.svdvals(weight @ root)
    torch.testing.assert_close((residual @ root).norm(), singular[3:].norm())
    torch.testing.assert_close(output_directions(weight, moment)[1], singular)
    assert factors.relative_error == pytest.approx(float(residual.norm() / weight.norm()))
    if moment is None:
        assert factors.weighted_error is None
    else:
        lost, whole = ((x @ each.T).norm() for each in (residual, weight))
        assert factors.weighted_error == pytest.approx(float(lost / whole))
        plain = nearest_low_rank(weight, 3)
        assert factors.weighted_error < 0.9 * float((x @ (weight - plain.u.T @ plain.v).T).norm() / whole)
        assert factors.relative_error > plain.relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_rank_is_exact_up_to_rounding(dtype: torch.dtype) -> None:
    weight = random_weight(6, 10, dtype)
    factors = nearest_low_rank(weight, 6)
    assert factors.u.dtype is dtype
    assert factors.relative_error < 4 * torch.finfo(dtype).eps
    x = torch.randn(10)
    torch.testing.assert_close(factors.times(x), factors.u.T.double() @ (factors.v.double() @ x.double()))


def test_a_weight_of_zeros_and_inputs_of_lower_rank() -> None:
    zeros = nearest_low_rank(torch.zeros(4, 5), 2)
    assert not (zeros.u.T @ zeros.v).any()
    assert zeros.relative_error == 0
    x = torch.zeros(50, 8)
    x[:, :2] = torch.randn(50, 2)
    factors = nearest_low_rank(torch.randn(6, 8), 2, input_moment=x.T @ x / 50)
    assert factors.weighted_error is not None
    assert factors.weighted_error < 0.05  # the ridge weighs the directions that no input has


def test_rows_are_fitted_by_their_weighted_principal_directions() -> None:
    rows, weights = random_weight(40, 12) + 3, torch.rand(40) + 0.1
    codes, basis, mean = principal_rows(rows, weights, 4)
    assert (codes.shape, basis.shape, mean.shape) == ((40, 4), (4, 12), (12,))
    torch.testing.assert_close(codes.square().mean().sqrt(), torch.tensor(1.0, dtype=torch.float64))
    share = (weights / weights.sum()).double()
    torch.testing.assert_close(mean, share @ rows)
    lost = float(weights.double() @ (codes @ basis + mean - rows).square().sum(1))
    singular = torch.linalg.svdvals((rows - mean) * weights.double().sqrt()[:, None])
    assert lost == pytest.approx(float(singular[4:].square().sum()))
    torch.testing.assert_close(principal_energies(rows, weights), singular.square())
    exact = principal_rows(rows.float(), weights, 12)
    torch.testing.assert_close(exact[0] @ exact[1] + exact[2], rows.float())


def test_fewer_rows_than_the_rank() -> None:
    rows = torch.randn(2, 6)
    codes, basis, mean = principal_rows(rows, torch.ones(2), 5)
    torch.testing.assert_close(codes @ basis + mean, rows)
    one = principal_rows(rows[:1], torch.ones(1), 3)
    torch.testing.assert_close(one[0] @ one[1] + one[2], rows[:1])


WEIGHT = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: nearest_low_rank(WEIGHT, 5), ValueError, r"rank: expected at most min\(m, n\) = 4, got 5"),
        (lambda: nearest_low_rank(WEIGHT, 0), ValueError, "rank: expected a positive int, got 0"),
        (lambda: nearest_low_rank(WEIGHT, 2.0), TypeError, "rank: expected a positive int, got 2.0"),
        (lambda: nearest_low_rank(WEIGHT / 0, 2), ValueError, "weight: expected finite values"),
        (lambda: nearest_low_rank(WEIGHT[0], 2), ValueError, r"weight: expected a non-empty matrix \(m, n\)"),
        (lambda: nearest_low_rank(WEIGHT, 2, input_moment=torch.eye(4)), ValueError, r"input_moment: .*\(6, 6\)"),
        (lambda: principal_rows(WEIGHT, torch.ones(4), 7), ValueError, "rank: expected at most the width 6, got 7"),
    ],
)
def test_bad_input(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
