"""What all modules with a Kronecker-factored weight share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..schemas.reference import kron_weight

Shape = tuple[int, int]
Shapes = tuple[Shape, Shape]


def empty_factors(shapes: Shapes, terms: int, factory: dict[str, Any]) -> tuple[nn.Parameter, nn.Parameter]:
    """Uninitialised factors ``a (terms, m1, n1)`` and ``b (terms, m2, n2)``."""
    if isinstance(terms, bool) or not isinstance(terms, int) or terms < 1:
        raise ValueError(f"terms: expected an integer of at least 1, got {terms!r}")
    a_shape, b_shape = shapes
    return nn.Parameter(torch.empty(terms, *a_shape, **factory)), nn.Parameter(torch.empty(terms, *b_shape, **factory))


def check_product_shape(shapes: Shapes, rows: int, cols: int) -> None:
    """Raise ValueError where ``((m1, n1), (m2, n2))`` is no product of a (rows, cols) weight."""
    (m1, n1), (m2, n2) = shapes
    if (m1 * m2, n1 * n2) != (rows, cols):
        raise ValueError(
            f"shapes: expected a product of shape (out_features, in_features) = ({rows}, {cols}), "
            f"got {m1}x{n1} (x) {m2}x{n2} of shape ({m1 * m2}, {n1 * n2})"
        )


class FactorShapes:
    """Number and shapes of a module's factors ``a (S, m1, n1)`` and ``b (S, m2, n2)``."""

    a: Tensor
    b: Tensor

    @property
    def terms(self) -> int:
        return self.a.shape[0]

    @property
    def shapes(self) -> Shapes:
        """((m1, n1), (m2, n2))."""
        (_, m1, n1), (_, m2, n2) = self.a.shape, self.b.shape
        return (m1, n1), (m2, n2)


class KronFactored(FactorShapes, nn.Module):
    """The factors ``a (S, m1, n1)`` and ``b (S, m2, n2)`` of a weight, and what all modules do with them."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.a = a
        self.b = b

    @property
    def dtype(self) -> torch.dtype:
        """That of ``a`` and ``b`` as they read, and of products with them."""
        b = self._parameters.get("b")  # nn.Module's own way to an attribute costs as much as a small op
        return (self.b if b is None else b).dtype

    def dense_weight(self) -> Tensor:
        """The weight (m1 * m2, n1 * n2), built in full; differentiable."""
        return kron_weight(self.a, self.b)

    def init_factors(self, std: float) -> None:
        # An entry of W sums S products of two independent entries: its variance is S * var(a) * var(b). Both factors
        # get the same share.
        factor_std = math.sqrt(std / math.sqrt(self.terms))
        nn.init.normal_(self.a, std=factor_std)
        nn.init.normal_(self.b, std=factor_std)

    def load_factors(self, a: Tensor, b: Tensor) -> None:
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)

    def factor_repr(self) -> str:
        (m1, n1), (m2, n2) = self.shapes
        compression = m1 * m2 * n1 * n2 / (self.terms * (m1 * n1 + m2 * n2))
        return f"factors={m1}x{n1} (x) {m2}x{n2}, terms={self.terms}, compression={compression:.2f}x"
