"""What is timed: a product, a feed-forward block, projections of one input, and the candidates that compute each.

All candidates of a problem share one set of random factors and are checked against the dense layers in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from ..factorize import order_cost
from ..ops import kron_ffn, kron_matmul, kron_qkv

# Largest ||y - y64|| / ||y64|| of a right result and of each right gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The gradient of a small factor of several terms is a sum of a million products that all but cancel.
TERMS_TOLERANCE = 3e-4


@dataclass(frozen=True)
class Layer:
    """A weight ``sum over terms of A (m1, n1) (x) B (m2, n2)``."""

    a: tuple[int, int]
    b: tuple[int, int]
    terms: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of the dense weight."""
        return self.a[0] * self.b[0], self.a[1] * self.b[1]

    @property
    def macs(self) -> int:
        """Multiply-adds a token in the cheaper contraction order."""
        return min(order_cost(*self.a, *self.b, self.terms))

    def __str__(self) -> str:
        pair = f"{self.a[0]}x{self.a[1]} (x) {self.b[0]}x{self.b[1]}"
        return pair if self.terms == 1 else f"{self.terms} of {pair}"


@dataclass(frozen=True)
class Case:
    """Layers and the op that computes them: "kron_matmul", "kron_ffn" (two layers) or "kron_qkv" (three)."""

    op: str
    layers: tuple[Layer, ...]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def dense_macs(self) -> int:
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def widths(self) -> tuple[int, int]:
        """``(m, n)``: values of an output and of an input row."""
        last = sum(layer.shape[0] for layer in self.layers) if self.op == "kron_qkv" else self.layers[-1].shape[0]
        return last, self.layers[0].shape[1]

    def __str__(self) -> str:
        return " -> ".join(map(str, self.layers)) if self.op != "kron_qkv" else f"3 x {self.layers[0]}"


# BERT-base's layers in the shapes of KroneckerBERT (NAACL 2022, table 1), a balanced pair, GPT-2's by TQCompressor.
_LAYERS = {
    "k8-attention": Layer((384, 384), (2, 2)),
    "k8-w1": Layer((8, 2), (384, 384)),
    "k8-w2": Layer((2, 8), (384, 384)),
    "k21-attention": Layer((384, 48), (2, 16)),
    "k21-w1": Layer((16, 2), (192, 384)),
    "k21-w2": Layer((2, 16), (384, 192)),
    "balanced": Layer((24, 24), (32, 32)),
    "balanced-w1": Layer((64, 16), (48, 48)),
    "balanced-w2": Layer((16, 64), (48, 48)),
    "tq-w1": Layer((768, 384), (4, 2), 4),
    "tq-w2": Layer((384, 768), (2, 4), 4),
}
CASES = {name: Case("kron_matmul", (layer,)) for name, layer in _LAYERS.items()}
_KINDS = ("k8", "k21", "balanced")
FFN_CASES = {f"{kind}-ffn": Case("kron_ffn", (_LAYERS[f"{kind}-w1"], _LAYERS[f"{kind}-w2"])) for kind in _KINDS}
QKV_CASES = {f"{kind}-qkv": Case("kron_qkv", (_LAYERS[f"{kind}-attention"],) * 3) for kind in ("k8", "k21")}


@dataclass(frozen=True)
class Candidate:
    """One candidate: ``function(x, *operands)`` on tensors of the problem, by their names.

    ``operands`` name, for each layer, ("a", "b", "bias") or ("weight", "bias"). ``prepare`` replaces them for the
    timed calls by packed ones; such a candidate has no gradients.
    """

    name: str
    function: Callable[..., Tensor]
    operands: tuple[str, ...] = ("a", "b", "bias")
    prepare: Callable[..., tuple[Tensor, ...]] | None = None
    rest_seconds: float = 0.0


def dense_op(op: str) -> Callable[..., Tensor]:
    """Return the dense form of an op: ``function(x, weight, bias, weight, bias, ...)``."""

    def ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)

    def qkv(x: Tensor, *operands: Tensor) -> Tensor:
        return F.linear(x, torch.cat(operands[0::2]), torch.cat(operands[1::2]))

    forms: dict[str, Callable[..., Tensor]] = {"kron_matmul": F.linear, "kron_ffn": ffn, "kron_qkv": qkv}
    return forms[op]


def kron_op(op: str, backend: str | None = None) -> Callable[..., Tensor]:
    """Return the op of this package: ``function(x, a, b, bias, a, b, bias, ...)``."""

    def qkv(x: Tensor, *operands: Tensor) -> Tensor:
        return torch.cat(kron_qkv(x, operands[0::3], operands[1::3], operands[2::3], backend=backend), -1)

    def matmul(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return kron_matmul(x, a, b, bias, backend=backend)

    def ffn(x: Tensor, *operands: Tensor) -> Tensor:
        return kron_ffn(x, *operands, backend=backend)

    forms: dict[str, Callable[..., Tensor]] = {"kron_matmul": matmul, "kron_ffn": ffn, "kron_qkv": qkv}
    return forms[op]


def b_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Compute ``sum over terms of A (X B^T)`` by two stock matrix products a term."""
    grid = x.reshape(-1, a.shape[-1], b.shape[-1])
    y = reduce(torch.add, (left @ (grid @ right.mT) for left, right in zip(a, b, strict=True)))
    return y.reshape(x.shape[0], -1) + bias


def a_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Compute ``sum over terms of (A X) B^T`` likewise."""
    grid = x.reshape(-1, a.shape[-1], b.shape[-1])
    y = reduce(torch.add, ((left @ grid) @ right.mT for left, right in zip(a, b, strict=True)))
    return y.reshape(x.shape[0], -1) + bias


@dataclass
class OpProblem:
    """One op on ``x (tokens, n)``, with ``copies`` independent sets of weights that take turns.

    One set keeps the weights in cache ("hot"); twelve are what an encoder of twelve layers does to it ("cold").
    """

    case: Case
    tokens: int
    dtype: torch.dtype
    backward: bool = False
    copies: int = 1
    device: str = "cpu"
    x: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    weights: list[list[dict[str, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        m, n = self.case.widths
        self.x, self.grad = self._normal(self.tokens, n), self._normal(self.tokens, m)
        self.weights = [[self._layer(layer) for layer in self.case.layers] for _ in range(self.copies)]

    def tolerance(self, _candidate: Candidate) -> float:
        terms = max(layer.terms for layer in self.case.layers)
        return max(TOLERANCE[self.dtype], TERMS_TOLERANCE if self.backward and terms > 1 else 0.0)

    def error(self, candidate: Candidate) -> float:
        """Return the largest relative error over the output and each gradient, against float64."""
        got = [self._call(candidate, self._operands(candidate, 0))]
        names = ["y"]
        if self.backward:
            got += self.runner(candidate)()
            names += ["x", *self._names(candidate)]
        errors = [relative_error(value, self._want[name]) for name, value in zip(names, got, strict=True)]
        # max() would let a NaN through.
        return max(errors) if all(error == error for error in errors) else float("nan")

    def runner(self, candidate: Candidate) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that computes once, with the next copy of the weights each time.

        Backward gives the gradients of x and of the operands.
        """
        copies = [self._operands(candidate, copy) for copy in range(self.copies)]
        if not self.backward:
            turn = itertools.cycle(copies)
            return lambda: (self._call(candidate, next(turn)),)
        if candidate.prepare is not None:
            raise ValueError(f"{candidate.name}: forward only")
        leaves = itertools.cycle([[t.detach().requires_grad_() for t in (self.x, *each)] for each in copies])

        def forward_backward() -> tuple[Tensor, ...]:
            inputs = next(leaves)
            return torch.autograd.grad(candidate.function(*inputs), inputs, self.grad)

        return forward_backward

    def _call(self, candidate: Candidate, operands: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            return candidate.function(self.x, *operands)

    def _names(self, candidate: Candidate) -> list[str]:
        return [f"{name}{index}" for index in range(len(self.case.layers)) for name in candidate.operands]

    def _operands(self, candidate: Candidate, copy: int) -> tuple[Tensor, ...]:
        tensors = tuple(layer[name] for layer in self.weights[copy] for name in candidate.operands)
        return tensors if candidate.prepare is None else candidate.prepare(*tensors)

    @cached_property
    def _want(self) -> dict[str, Tensor]:
        leaves, dense = {"x": self.x.double().requires_grad_(self.backward)}, []
        for index, layer in enumerate(self.weights[0]):
            a, b, bias = (layer[name].double().requires_grad_(self.backward) for name in ("a", "b", "bias"))
            weight = dense_weight(a, b)
            leaves |= {f"a{index}": a, f"b{index}": b, f"bias{index}": bias, f"weight{index}": weight}
            dense += [weight, bias]
        y = dense_op(self.case.op)(leaves["x"], *dense)
        if not self.backward:
            return {"y": y}
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad.double())
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * scale).to(self.device, self.dtype)

    def _layer(self, layer: Layer) -> dict[str, Tensor]:
        (m1, n1), (m2, n2), terms = layer.a, layer.b, layer.terms
        a = self._normal(terms, m1, n1, scale=n1**-0.5)
        b = self._normal(terms, m2, n2, scale=(n2 * terms) ** -0.5)
        return {"a": a, "b": b, "bias": self._normal(m1 * m2), "weight": dense_weight(a, b)}


def dense_weight(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum over terms of kron(a, b)``, (m, n)."""
    return torch.stack([torch.kron(left, right) for left, right in zip(a, b, strict=True)]).sum(0)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ``||got - want|| / ||want||`` in float64."""
    return float((got.double() - want).norm() / want.norm())
