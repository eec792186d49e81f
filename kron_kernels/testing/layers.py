"""One linear layer, computed in several ways: the cases of BERT-base and the stock ways to compute them.

Every way is checked against the float64 reference before it may be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..factorize import order_cost
from ..ops import kron_matmul
from ..schemas import reference
from .problem import Candidate, Problem, random_normal


@dataclass(frozen=True)
class LayerCase:
    """A layer whose weight is one Kronecker product, A ``(m1, n1)`` with B ``(m2, n2)``."""

    name: str
    a: tuple[int, int]
    b: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of the dense weight."""
        return self.a[0] * self.b[0], self.a[1] * self.b[1]

    @property
    def macs(self) -> int:
        """Multiply-adds a token in the cheaper contraction order."""
        return min(order_cost(*self.a, *self.b, 1))

    @property
    def dense_macs(self) -> int:
        """Multiply-adds a token of the dense layer."""
        return self.shape[0] * self.shape[1]

    @property
    def saving(self) -> float:
        """How many times fewer multiply-adds than the dense layer."""
        return self.dense_macs / self.macs

    def __str__(self) -> str:
        return f"{self.a[0]}x{self.a[1]} (x) {self.b[0]}x{self.b[1]}"


# BERT-base's linear layers in the shapes of KroneckerBERT (NAACL 2022, table 1), and three balanced pairs.
CASES = {
    case.name: case
    for case in (
        LayerCase("k8-attention", (384, 384), (2, 2)),
        LayerCase("k8-w1", (8, 2), (384, 384)),
        LayerCase("k8-w2", (2, 8), (384, 384)),
        LayerCase("k21-attention", (384, 48), (2, 16)),
        LayerCase("k21-w1", (16, 2), (192, 384)),
        LayerCase("k21-w2", (2, 16), (384, 192)),
        LayerCase("balanced", (24, 24), (32, 32)),
        LayerCase("balanced-w1", (64, 16), (48, 48)),
        LayerCase("balanced-w2", (16, 64), (48, 48)),
    )
}


@dataclass(frozen=True)
class Weights:
    """One layer's random weights: a ``(m1, n1)``, b ``(m2, n2)``, bias ``(m,)``, and weight ``(m, n)`` = a (x) b."""

    a: Tensor
    b: Tensor
    bias: Tensor
    weight: Tensor


@dataclass
class LayerProblem(Problem):
    """One layer on ``x (tokens, n)``, with ``copies`` independent sets of weights."""

    case: LayerCase
    tokens: int
    dtype: torch.dtype
    backward: bool = False
    copies: int = 1

    def __post_init__(self) -> None:
        normal = random_normal(self.dtype)
        m, n = self.case.shape
        self.x, self.grad = normal(self.tokens, n), normal(self.tokens, m)
        self.weights = [random_weights(self.case, normal) for _ in range(self.copies)]

    def reference(self) -> dict[str, Tensor]:
        x, grad, weights = self.x.double(), self.grad.double(), self.weights[0]
        a, b = weights.a.double()[None], weights.b.double()[None]
        want = {"y": reference.kron_matmul(x, a, b, weights.bias.double())}
        if self.backward:
            dx, da, db, dbias = reference.kron_matmul_backward(grad, x, a, b)
            want |= {"x": dx, "a": da[0], "b": db[0], "bias": dbias, "weight": grad.T @ x}
        return want


def random_weights(case: LayerCase, normal: Callable[..., Tensor]) -> Weights:
    """Weights of one layer that keep unit variance."""
    (m1, n1), (m2, n2) = case.a, case.b
    a, b, bias = normal(m1, n1, scale=n1**-0.5), normal(m2, n2, scale=n2**-0.5), normal(m1 * m2)
    return Weights(a, b, bias, torch.kron(a, b))


def _factors(weights: Weights, _tokens: int) -> tuple[Tensor, ...]:
    return weights.a, weights.b, weights.bias


def _dense(weights: Weights, _tokens: int) -> tuple[Tensor, ...]:
    return weights.weight, weights.bias


def b_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Two stock matrix products, ``A (X B^T)``."""
    grid = x.reshape(-1, a.shape[1], b.shape[1])
    return torch.matmul(a, torch.matmul(grid, b.mT)).reshape(x.shape[0], -1) + bias


def a_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Two stock matrix products, ``(A X) B^T``."""
    grid = x.reshape(-1, a.shape[1], b.shape[1])
    return torch.matmul(torch.matmul(a, grid), b.mT).reshape(x.shape[0], -1) + bias


def _materialised(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, torch.kron(a, b), bias)


_FACTORS = ("a", "b", "bias")
DENSE = Candidate("dense", F.linear, _dense, ("weight", "bias"))
OURS = Candidate("kron_kernels", kron_matmul, _factors, _FACTORS)
B_FIRST = Candidate("matmul B first", b_first, _factors, _FACTORS)
A_FIRST = Candidate("matmul A first", a_first, _factors, _FACTORS)
MATERIALISED = Candidate("torch.kron + linear", _materialised, _factors, _FACTORS)
STOCK = (DENSE, MATERIALISED, B_FIRST, A_FIRST, OURS)
