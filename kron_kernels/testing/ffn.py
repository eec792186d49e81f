"""A feed-forward block, ``W2 gelu(W1 x + bias1) + bias2``, computed in several ways, each checked against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import kron_ffn, kron_matmul, pack_factors
from .layers import CASES as LAYERS
from .layers import LayerCase, Weights, random_weights
from .problem import Candidate, Problem, random_normal


@dataclass(frozen=True)
class FfnCase:
    """Two layers with GELU (erf) between them."""

    name: str
    first: LayerCase
    second: LayerCase

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``: width of the output and of the input."""
        return self.second.shape[0], self.first.shape[1]

    @property
    def macs(self) -> int:
        """Multiply-adds a token of both products, each in its cheaper order."""
        return self.first.macs + self.second.macs

    @property
    def dense_macs(self) -> int:
        """Multiply-adds a token of both dense layers."""
        return self.first.dense_macs + self.second.dense_macs

    @property
    def saving(self) -> float:
        """How many times fewer multiply-adds than the dense block."""
        return self.dense_macs / self.macs

    def __str__(self) -> str:
        return f"{self.first} -> {self.second}"


# BERT-base's feed-forward block in the shapes of KroneckerBERT (NAACL 2022, table 1), and a balanced pair.
CASES = {
    f"{name}-ffn": FfnCase(f"{name}-ffn", LAYERS[f"{name}-w1"], LAYERS[f"{name}-w2"])
    for name in ("k8", "k21", "balanced")
}


@dataclass
class FfnProblem(Problem):
    """One block on ``x (tokens, n)``, with ``copies`` independent pairs of :class:`Weights`."""

    case: FfnCase
    tokens: int
    dtype: torch.dtype
    backward: bool = False
    copies: int = 1

    def __post_init__(self) -> None:
        normal = random_normal(self.dtype)
        m, n = self.case.shape
        self.x, self.grad = normal(self.tokens, n), normal(self.tokens, m)
        self.weights: list[tuple[Weights, Weights]] = [
            (random_weights(self.case.first, normal), random_weights(self.case.second, normal))
            for _ in range(self.copies)
        ]

    def reference(self) -> dict[str, Tensor]:
        """Through the dense weights of the factors, by autograd in float64."""
        names = ("x", "a1", "b1", "bias1", "a2", "b2", "bias2")
        first, second = self.weights[0]
        tensors = (self.x, first.a, first.b, first.bias, second.a, second.b, second.bias)
        x, a1, b1, bias1, a2, b2, bias2 = (tensor.double().requires_grad_(self.backward) for tensor in tensors)
        weight1, weight2 = torch.kron(a1, b1), torch.kron(a2, b2)
        y = dense_ffn(x, weight1, bias1, weight2, bias2)
        if not self.backward:
            return {"y": y}
        leaves = dict(zip(names, (x, a1, b1, bias1, a2, b2, bias2), strict=True))
        leaves |= {"weight1": weight1, "weight2": weight2}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad.double())
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def dense_ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """The block with stock dense layers."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _two_products(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor,
    packed1: Tensor | None = None,
    packed2: Tensor | None = None,
) -> Tensor:
    hidden = kron_matmul(x, a1, b1, bias1, activation="gelu", packed=packed1)
    return kron_matmul(hidden, a2, b2, bias2, packed=packed2)


def _fused(x: Tensor, *operands: Tensor) -> Tensor:
    factors, packed = operands[:6], operands[6:]
    return kron_ffn(x, *factors, packed=(packed[0], packed[1]) if packed else (None, None))


def _dense_operands(weights: tuple[Weights, Weights], _tokens: int) -> tuple[Tensor, ...]:
    return tuple(tensor for layer in weights for tensor in (layer.weight, layer.bias))


def factors(weights: tuple[Weights, Weights], _tokens: int) -> tuple[Tensor, ...]:
    """``a1, b1, bias1, a2, b2, bias2``."""
    return tuple(tensor for layer in weights for tensor in (layer.a, layer.b, layer.bias))


def _packed_factors(weights: tuple[Weights, Weights], tokens: int) -> tuple[Tensor, ...]:
    return (*factors(weights, tokens), *(pack_factors(layer.a, layer.b) for layer in weights))


FACTORS = ("a1", "b1", "bias1", "a2", "b2", "bias2")
DENSE = Candidate("dense", dense_ffn, _dense_operands, ("weight1", "bias1", "weight2", "bias2"))


def fused(problem: FfnProblem) -> Candidate:
    """``kron_ffn``; without gradients on factors packed ahead, as a module has them."""
    return _ours("kron_kernels", _fused, problem)


def two_products(problem: FfnProblem) -> Candidate:
    """Two ``kron_matmul``, likewise."""
    return _ours("kron_matmul twice", _two_products, problem)


def _ours(name: str, function: Callable[..., Tensor], problem: FfnProblem) -> Candidate:
    if problem.backward:
        return Candidate(name, function, factors, FACTORS)
    return Candidate(name, function, _packed_factors, None)
