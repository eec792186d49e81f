"""One linear layer, computed in several ways: the cases of BERT-base and the stock ways to compute them.

Every way is checked against the float64 reference before it may be timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..factorize import order_cost
from ..functional import kron_matmul

# Largest ||y - y64|| / ||y64|| a way may show; the same bound holds for each gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


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
    def saving(self) -> float:
        """How many times fewer multiply-adds than the dense layer."""
        m, n = self.shape
        return m * n / self.macs

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


@dataclass(frozen=True)
class Candidate:
    """A way to compute the layer: ``function(x, *operands)`` with ``operands = prepare(weights, tokens)``.

    ``differentiates`` says of each operand what it is ("a", "b", "bias", "weight"), in order; None: forward only.
    """

    name: str
    function: Callable[..., Tensor]
    prepare: Callable[[Weights, int], tuple[Tensor, ...]]
    differentiates: tuple[str, ...] | None
    rest_seconds: float = 0.0


@dataclass
class LayerProblem:
    """Inputs of one measurement: ``x (tokens, n)`` and ``copies`` independent layers that take turns.

    One copy keeps the weights in cache; twelve are what an encoder of twelve layers does to it.
    """

    case: LayerCase
    tokens: int
    dtype: torch.dtype
    backward: bool = False
    copies: int = 1
    x: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    weights: list[Weights] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.dtype)

        (m1, n1), (m2, n2) = self.case.a, self.case.b
        self.x, self.grad = normal(self.tokens, n1 * n2), normal(self.tokens, m1 * m2)
        self.weights = []
        for _ in range(self.copies):
            a, b, bias = normal(m1, n1, scale=n1**-0.5), normal(m2, n2, scale=n2**-0.5), normal(m1 * m2)
            self.weights.append(Weights(a, b, bias, torch.kron(a, b)))

    def error(self, candidate: Candidate) -> float:
        """Largest relative error ``||got - want|| / ||want||`` over the output and each gradient, against float64."""
        weights = self.weights[0]
        a, b = weights.a.double()[None], weights.b.double()[None]
        want = {"y": reference.kron_mm(self.x.double(), a, b, weights.bias.double())}
        operands = candidate.prepare(weights, self.tokens)
        if not self.backward:
            with torch.inference_mode():
                got = {"y": candidate.function(self.x, *operands)}
        else:
            dx, da, db, dbias = reference.kron_mm_backward(self.grad.double(), self.x.double(), a, b)
            want |= {"x": dx, "a": da[0], "b": db[0], "bias": dbias}
            if "weight" in (candidate.differentiates or ()):
                want["weight"] = self.grad.double().T @ self.x.double()
            leaves = [tensor.detach().requires_grad_() for tensor in (self.x, *operands)]
            y = candidate.function(*leaves)
            names = ("y", "x", *(candidate.differentiates or ()))
            got = dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, self.grad)), strict=True))
        errors = [relative_error(got[name], want[name]) for name in got if name in want]
        # max() would let a NaN through.
        return max(errors) if all(error == error for error in errors) else float("nan")

    def runner(self, candidate: Candidate) -> Callable[[], object]:
        """A function of no arguments that computes the layer once, with the next copy of the weights each time."""
        turn = itertools.cycle([candidate.prepare(weights, self.tokens) for weights in self.weights])
        function, x, grad = candidate.function, self.x, self.grad
        if not self.backward:

            def forward() -> Tensor:
                with torch.inference_mode():
                    return function(x, *next(turn))

            return forward

        leaves = itertools.cycle(
            [[tensor.detach().requires_grad_() for tensor in (x, *next(turn))] for _ in range(len(self.weights))]
        )

        def forward_backward() -> tuple[Tensor, ...]:
            inputs = next(leaves)
            return torch.autograd.grad(function(*inputs), inputs, grad)

        return forward_backward


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in float64."""
    return float((got.double() - want).norm() / want.norm())


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
