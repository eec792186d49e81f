"""Kronecker factor shapes of one weight: what each costs, and a search under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..schemas.reference import order_cost
from .checks import check_a_shape, check_moment, check_positive, check_weight
from .nearest import nearest_kronecker
from .vanloan import van_loan_error


@dataclass(frozen=True)
class FactorShape:
    """One way to write an (m, n) weight as a sum of ``terms`` products of an ``a`` and a ``b`` matrix.

    ``params`` counts the entries of all factors, ``macs`` the multiply-adds a token in the cheaper contraction order.
    ``relative_error`` and ``weighted_error`` are those of a fit to the weight that was searched, None without one.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    terms: int
    params: int
    macs: int
    relative_error: float | None = None
    weighted_error: float | None = None

    @property
    def flops(self) -> int:
        """Multiplications and additions a token in the cheaper order: an inner product of k pairs takes 2 k - 1."""
        (m1, n1), (m2, n2) = self.a, self.b
        b_first, a_first = order_cost(m1, n1, m2, n2, self.terms)
        inner_results = n1 * m2 if b_first <= a_first else m1 * n2
        return 2 * self.macs - self.terms * inner_results - m1 * m2


def factor_shape(m: int, n: int, a_shape: Sequence[int], terms: int = 1) -> FactorShape:
    """The FactorShape of an (m, n) weight whose first factor is ``a_shape``; ValueError where that does not divide."""
    m1, n1 = check_a_shape(a_shape, m, n)
    m2, n2 = m // m1, n // n1
    params = terms * (m1 * n1 + m2 * n2)
    return FactorShape((m1, n1), (m2, n2), terms, params, min(order_cost(m1, n1, m2, n2, terms)))


def divisors(number: int) -> list[int]:
    """All divisors of a positive int, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


@torch.no_grad()
def search_factor_shapes(
    m: int,
    n: int,
    *,
    weight: Tensor | None = None,
    input_moment: Tensor | None = None,
    max_params: int | None = None,
    max_macs: int | None = None,
    terms: Sequence[int] = (1,),
    rounds: int = 5,
    limit: int | None = 20,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[FactorShape]:
    """All factor shapes of an (m, n) weight within a budget, best first.

    With ``weight`` (m, n) every shape within the budget is fitted and the list is ordered by error, then by
    multiply-adds: by the Frobenius error of the nearest Kronecker product, which needs leading singular values only,
    or, with ``input_moment`` (n, n), by the weighted error of a data-aware fit of ``rounds`` rounds, which takes
    longer. Without ``weight`` the order is by parameters kept, most first, since captured energy follows them closely,
    then by multiply-adds.

    ``max_params`` bounds the stored entries (m*n - 1 unless given), ``max_macs`` the multiply-adds a token, ``terms``
    lists the numbers of terms to try (those beyond a shape's full rank are left out), ``limit`` cuts the list (None:
    all), and ``progress(done, total, shape)`` is called after each fit. Raises ValueError or TypeError for arguments
    out of range.
    """
    check_positive("m", m)
    check_positive("n", n)
    for count in terms:
        check_positive("terms", count)
    if weight is not None:
        check_weight(weight, (m, n))
    if input_moment is not None:
        if weight is None:
            raise ValueError("input_moment: expected together with weight, got weight=None")
        check_moment(input_moment, n)
    candidates = [
        factor_shape(m, n, (m1, n1), count)
        for m1 in divisors(m)
        for n1 in divisors(n)
        for count in terms
        if count <= min(m1 * n1, m * n // (m1 * n1))
    ]
    most = m * n - 1 if max_params is None else max_params
    shapes = [s for s in candidates if s.params <= most and (max_macs is None or s.macs <= max_macs)]
    if weight is None:
        return sorted(shapes, key=lambda shape: (-shape.params, shape.macs))[:limit]
    fitted: list[tuple[float, int, FactorShape]] = []
    for done, shape in enumerate(shapes, 1):
        if input_moment is None:
            error = van_loan_error(weight, shape.a, shape.terms)
            found = replace(shape, relative_error=error)
        else:
            factors = nearest_kronecker(weight, shape.a, shape.terms, input_moment=input_moment, rounds=rounds)
            error = factors.weighted_error or 0.0
            found = replace(shape, relative_error=factors.relative_error, weighted_error=error)
        fitted.append((error, shape.macs, found))
        if progress is not None:
            progress(done, len(shapes), f"{shape.a[0]}x{shape.a[1]} (x) {shape.b[0]}x{shape.b[1]}, {shape.terms} terms")
    fitted.sort(key=lambda entry: entry[:2])
    return [found for _, _, found in fitted[:limit]]
