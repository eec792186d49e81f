"""Kronecker factor shapes of one weight, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..schemas.reference import order_cost
from .checks import check_a_shape


@dataclass(frozen=True)
class FactorShape:
    """A form of an (m, n) weight: a sum of ``terms`` products of an ``a`` and a ``b`` matrix.

    ``params`` counts the entries of all factors, ``macs`` the multiply-adds a token in the cheaper contraction order.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    terms: int
    params: int
    macs: int

    @property
    def flops(self) -> int:
        """Multiplications and additions a token in the cheaper order: an inner product of k pairs takes 2 k - 1."""
        (m1, n1), (m2, n2) = self.a, self.b
        b_first, a_first = order_cost(m1, n1, m2, n2, self.terms)
        inner_results = n1 * m2 if b_first <= a_first else m1 * n2
        return 2 * self.macs - self.terms * inner_results - m1 * m2


def factor_shape(m: int, n: int, a_shape: Sequence[int], terms: int = 1) -> FactorShape:
    """Make the FactorShape of an (m, n) weight with first factor ``a_shape``; ValueError where that does not divide."""
    m1, n1 = check_a_shape(a_shape, m, n)
    m2, n2 = m // m1, n // n1
    params = terms * (m1 * n1 + m2 * n2)
    return FactorShape((m1, n1), (m2, n2), terms, params, min(order_cost(m1, n1, m2, n2, terms)))


def divisors(number: int) -> list[int]:
    """List all divisors of a positive int, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]
