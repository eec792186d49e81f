"""The factors of a product: as stacks of terms, and their sizes as plans and choices of a backend see them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# A factor of at most this many rows and columns is tiny: its contraction is arithmetic on the registers of one thread.
TINY = 16


class Product(NamedTuple):
    """``sum_s A_s (x) B_s`` with ``A_s (m1, n1)``, ``B_s (m2, n2)``."""

    terms: int
    m1: int
    n1: int
    m2: int
    n2: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Product:
        """Of factors ``a (S, m1, n1)`` and ``b (S, m2, n2)``, or of two matrices."""
        return cls(a.shape[0] if a.dim() == 3 else 1, *a.shape[-2:], *b.shape[-2:])

    @property
    def tiny_right(self) -> bool | None:
        """Which factor is the small one: that on the right, on the left, or None where both are too large.

        Of two tiny ones that which leaves fewer rows of the matrix product.
        """
        left = max(self.m1, self.n1) <= TINY
        right = max(self.m2, self.n2) <= TINY
        if left and right:
            return min(self.m2, self.n2) < min(self.m1, self.n1)
        return right if left or right else None

    @property
    def transposed(self) -> Product:
        """The product that takes a gradient of the result to one of the input."""
        return Product(self.terms, self.n1, self.m1, self.n2, self.m2)

    def __str__(self) -> str:
        pairs = f"{self.m1}x{self.n1} (x) {self.m2}x{self.n2}"
        return pairs if self.terms == 1 else f"{self.terms} terms of {pairs}"


def stacks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as stacks: two matrices are one term."""
    return (a.unsqueeze(0), b.unsqueeze(0)) if a.dim() == 2 and b.dim() == 2 else (a, b)
