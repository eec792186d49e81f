"""The data-aware fit: descends, beats the plain one where inputs are uneven, and equals it where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.factorize import nearest_kronecker
from kron_kernels.schemas.reference import kron_weight


def uneven_inputs(tokens: int, n: int) -> Tensor:
    """Correlated inputs (tokens, n) whose variance spans four decades."""
    return torch.randn(tokens, n) * torch.logspace(0, -2, n) @ torch.linalg.qr(torch.randn(n, n)).Q


def output_error(weight: Tensor, factors: object, x: Tensor) -> float:
    approximate = kron_weight(factors.a, factors.b)  # type: ignore[attr-defined]
    return float((x @ (weight - approximate).T).norm() / (x @ weight.T).norm())


CASES = [
    ((24, 36), (12, 18), 1),
    ((48, 24), (8, 2), 1),
    ((24, 36), (6, 6), 3),
]


@pytest.mark.parametrize(("size", "a_shape", "terms"), CASES)
def test_lowers_the_output_error(size: tuple[int, int], a_shape: tuple[int, int], terms: int) -> None:
    weight, x = torch.randn(*size), uneven_inputs(4000, size[1])
    moment = x.T @ x / len(x)
    plain = nearest_kronecker(weight, a_shape, terms)
    aware = nearest_kronecker(weight, a_shape, terms, input_moment=moment)
    assert aware.weighted_error == pytest.approx(output_error(weight, aware, x), rel=1e-4)
    assert output_error(weight, aware, x) < 0.93 * output_error(weight, plain, x)
    assert aware.relative_error >= plain.relative_error
    assert plain.weighted_error is None
    history = torch.tensor(aware.history, dtype=torch.float64)
    assert len(history) > 3
    assert (history.diff() <= 1e-12).all()


@pytest.mark.parametrize(("size", "a_shape", "terms"), CASES)
def test_is_stationary_in_each_factor(size: tuple[int, int], a_shape: tuple[int, int], terms: int) -> None:
    weight, x = torch.randn(*size, dtype=torch.float64), uneven_inputs(2000, size[1]).double()
    moment = x.T @ x / len(x)
    factors = nearest_kronecker(weight, a_shape, terms, input_moment=moment, rounds=3000)
    ridge = 1e-2 * moment.diagonal().mean() * torch.eye(size[1], dtype=torch.float64)
    a, b = factors.a.requires_grad_(), factors.b.requires_grad_()
    lost = weight - kron_weight(a, b)
    loss = ((lost @ (moment + ridge)) * lost).sum() / ((weight @ moment) * weight).sum()
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert float(gradient.norm()) < 2e-3


@pytest.mark.parametrize("terms", [2])
def test_each_half_is_the_least_squares_solution(terms: int) -> None:
    weight, x = torch.randn(6, 12, dtype=torch.float64), uneven_inputs(200, 12).double()
    moment = x.T @ x / len(x)
    factors = nearest_kronecker(weight, (3, 4), terms, input_moment=moment, rounds=1)
    root = torch.linalg.cholesky(moment + 1e-2 * moment.diagonal().mean() * torch.eye(12))

    def solve(basis: list[Tensor], count: int) -> Tensor:
        design = torch.stack([(product @ root).flatten() for product in basis], 1)
        return torch.linalg.lstsq(design, (weight @ root).flatten()).solution.view(terms, count)

    b = nearest_kronecker(weight, (3, 4), terms).b
    units = torch.eye(12).double().view(12, 3, 4)
    a = solve([torch.kron(unit, b[s]) for s in range(terms) for unit in units], 12).view(terms, 3, 4)
    units = torch.eye(6).double().view(6, 2, 3)
    b = solve([torch.kron(a[s], unit) for s in range(terms) for unit in units], 6).view(terms, 2, 3)
    torch.testing.assert_close(kron_weight(factors.a, factors.b), kron_weight(a, b))


def test_white_inputs_give_the_plain_factors() -> None:
    weight, terms = torch.randn(24, 20, dtype=torch.float64), 2
    plain = nearest_kronecker(weight, (6, 5), terms)
    aware = nearest_kronecker(weight, (6, 5), terms, input_moment=3 * torch.eye(20))
    torch.testing.assert_close(kron_weight(aware.a, aware.b), kron_weight(plain.a, plain.b))
    torch.testing.assert_close(aware.a, plain.a)
    assert aware.weighted_error == pytest.approx(plain.relative_error)


def test_full_terms_stay_exact() -> None:
    weight, x = torch.randn(12, 20, dtype=torch.float64), uneven_inputs(100, 20).double()
    factors = nearest_kronecker(weight, (4, 2), 8, input_moment=x.T @ x)
    torch.testing.assert_close(kron_weight(factors.a, factors.b), weight)


@pytest.mark.parametrize("seen", [1, 3])
def test_few_calibration_tokens(seen: int) -> None:
    weight, x = torch.randn(24, 36), torch.randn(seen, 36)
    factors = nearest_kronecker(weight, (12, 18), input_moment=x.T @ x / seen)
    assert factors.a.isfinite().all()
    assert factors.b.isfinite().all()
    assert output_error(weight, factors, x) < 0.2
    assert factors.relative_error < 2


def test_low_precision_weight_and_moment() -> None:
    weight, x = torch.randn(24, 36).bfloat16(), uneven_inputs(1000, 36)
    factors = nearest_kronecker(weight, (12, 18), input_moment=(x.T @ x / 1000).bfloat16())
    assert factors.a.dtype == torch.bfloat16
    assert output_error(weight.float(), factors, x) < 0.9


def test_zero_weight() -> None:
    factors = nearest_kronecker(torch.zeros(8, 6), (4, 3), input_moment=torch.eye(6))
    assert factors.weighted_error == 0
    assert factors.a.isfinite().all()
