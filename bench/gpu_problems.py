"""What is measured on a GPU: products, feed-forward blocks, projections of one input, embeddings, with their floors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels.backends.triton.problems import (
    DTYPES,
    EMBEDDINGS,
    FFNS,
    LAYERS,
    POSITIONS,
    QKVS,
    TYPES,
    Layer,
)
from kron_kernels.factorize import order_cost
from kron_kernels.schemas import reference
from kron_kernels.schemas.product import Product
from kron_kernels.testing.problem import Candidate, Problem

# Sizes for a rehearsal, where an interpreter runs the kernels.
REHEARSED = {
    "k8-attention": Layer((24, 24), (2, 2)),
    "k8-w1": Layer((8, 2), (16, 16)),
    "k8-w2": Layer((2, 8), (16, 16)),
    "tq-w1": Layer((32, 16), (4, 2), 4),
    "balanced": Layer((6, 6), (8, 8)),
}
EPS = 1e-12


class Weights(NamedTuple):
    """One layer: ``a (S, m1, n1)``, ``b (S, m2, n2)``, ``bias (m,)``, and ``weight (m, n)``, the dense one."""

    a: Tensor
    b: Tensor
    bias: Tensor
    weight: Tensor


class Work(NamedTuple):
    """Least bytes to move and operations to do."""

    bytes: int
    flop: int


@dataclass
class GpuProblem(Problem):
    """``case`` of the tables, on ``x (tokens, n)`` of a device; ``layers`` are its products, ``op`` computes it."""

    op: ClassVar[str]
    case: str
    tokens: int
    dtype_name: str
    backward: bool
    device: str
    rehearse: bool = False

    def __post_init__(self) -> None:
        self.dtype = DTYPES[self.dtype_name]
        self._generator = torch.Generator(self.device).manual_seed(0)
        self.layers = [(REHEARSED if self.rehearse else LAYERS)[name] for name in self.layer_names()]
        self.make()

    def layer_names(self) -> Sequence[str]:
        raise NotImplementedError

    def products(self) -> tuple[Product, ...]:
        """As the choice of a backend sees them."""
        return tuple(Product(layer.terms, *layer.a, *layer.b) for layer in self.layers)

    def make(self) -> None:
        """Sets x, grad and weights."""
        n, m = self.layers[0].shape[1], self.layers[-1].shape[0]
        self.x, self.grad = self.normal(self.tokens, n), self.normal(self.tokens, m)
        weights = tuple(self.layer_weights(layer) for layer in self.layers)
        self.weights = [weights if len(weights) > 1 else weights[0]]

    def work(self) -> Work:
        """Of forward: x and the factors in, y out. Backward: grad and x in, dx and the factors' gradients out."""
        (m, n), element = (self.layers[-1].shape[0], self.layers[0].shape[1]), self.dtype.itemsize
        factors = sum(layer.terms * (_area(layer.a) + _area(layer.b)) for layer in self.layers)
        values = self.tokens * (n + m) + factors
        if self.backward:
            values += self.tokens * (m + 2 * n) + 2 * factors
        macs = sum(layer.terms * min(order_cost(*layer.a, *layer.b, 1)) for layer in self.layers)
        return Work(values * element, 2 * self.tokens * macs * (3 if self.backward else 1))

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=self._generator, dtype=self.dtype, device=self.device) * scale

    def layer_weights(self, layer: Layer) -> Weights:
        a, b = layer.factors(self.normal)
        return Weights(a, b, self.normal(layer.shape[0]), reference.kron_weight(a.double(), b.double()).to(self.dtype))


class LayerProblem(GpuProblem):
    """One product with its bias."""

    op = "kron_matmul"

    def layer_names(self) -> Sequence[str]:
        return (self.case,)

    def reference(self) -> Mapping[str, Tensor]:
        a, b, bias = (tensor.double() for tensor in self.weights[0][:3])
        x, grad = self.x.double(), self.grad.double()
        want = {"y": reference.kron_matmul(x, a, b, bias)}
        if self.backward:
            dx, da, db, dbias = reference.kron_matmul_backward(grad, x, a, b)
            want |= {"x": dx, "a": da, "b": db, "bias": dbias, "weight": grad.T @ x}
        return want


class FfnProblem(GpuProblem):
    """Two products with GELU between them."""

    op = "kron_ffn"

    def layer_names(self) -> Sequence[str]:
        return FFNS[self.case]

    def reference(self) -> Mapping[str, Tensor]:
        first, second = self.weights[0]
        names = ("x", "a1", "b1", "bias1", "a2", "b2", "bias2")
        leaves = [t.double().requires_grad_(self.backward) for t in (self.x, *first[:3], *second[:3])]
        x, a1, b1, bias1, a2, b2, bias2 = leaves
        weight1, weight2 = reference.kron_weight(a1, b1), reference.kron_weight(a2, b2)
        y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
        if not self.backward:
            return {"y": y}
        gradients = torch.autograd.grad(y, [*leaves, weight1, weight2], self.grad.double())
        return {"y": y.detach(), **dict(zip((*names, "weight1", "weight2"), gradients, strict=True))}


class QkvProblem(GpuProblem):
    """Three products of one input. Candidates give a tuple, or one tensor of all; forward only."""

    op = "kron_qkv"

    def layer_names(self) -> Sequence[str]:
        return (QKVS[self.case],) * 3

    def reference(self) -> Mapping[str, Tensor]:
        x = self.x.double()
        each = [reference.kron_matmul(x, *(tensor.double() for tensor in layer[:3])) for layer in self.weights[0]]
        return {"y": torch.cat(each, -1)}

    def error(self, candidate: Candidate) -> float:
        function = candidate.function

        def joined(x: Tensor, *operands: Any) -> Tensor:
            y = function(x, *operands)
            return y if isinstance(y, Tensor) else torch.cat(y, -1)

        return super().error(dataclasses.replace(candidate, function=joined))

    def work(self) -> Work:
        work, m = super().work(), self.layers[0].shape[0]
        return Work(work.bytes + 2 * self.tokens * m * self.dtype.itemsize, work.flop)


class EmbeddingProblem(GpuProblem):
    """BERT's embedding: words, positions and types, with the norm. ``x`` are ids; forward only."""

    op = "kron_embedding"

    def layer_names(self) -> Sequence[str]:
        return ()

    def products(self) -> tuple[Product, ...]:
        rows, p, k = self._sizes()
        return (Product(1, rows, p, 1, k),)

    def _sizes(self) -> tuple[int, int, int]:
        return (100, 4, 8) if self.rehearse else EMBEDDINGS[self.case]

    def make(self) -> None:
        rows, p, k = self._sizes()
        width = p * k
        self.x = torch.randint(0, rows, (self.tokens,), generator=self._generator, device=self.device)
        self.positions = torch.arange(self.tokens, device=self.device) % 128
        self.types = torch.zeros_like(self.x)
        a, b = self.normal(1, rows, p), self.normal(1, 1, k)
        tables = (self.normal(POSITIONS, width), self.normal(TYPES, width), self.normal(width), self.normal(width))
        self.weights = [(a, b, reference.kron_weight(a.double(), b.double()).to(self.dtype), *tables)]

    def reference(self) -> Mapping[str, Tensor]:
        a, b, _, positions, types, weight, bias = (tensor.double() for tensor in self.weights[0])
        added = (self.positions, positions, self.types, types, weight, bias)
        return {"y": reference.kron_embedding(self.x, a, b, *added, EPS)}

    def work(self) -> Work:
        (_, p, k), element = self._sizes(), self.dtype.itemsize
        # Three ids, a row of A and one of the positions in, a row out.
        return Work(self.tokens * (3 * 8 + (p + 2 * p * k) * element), 0)


_KINDS: dict[str, Callable[..., GpuProblem]] = {
    **dict.fromkeys(LAYERS, LayerProblem),
    **dict.fromkeys(FFNS, FfnProblem),
    **dict.fromkeys(QKVS, QkvProblem),
    **dict.fromkeys(EMBEDDINGS, EmbeddingProblem),
}


@dataclass(frozen=True)
class Point:
    """One measurement: everything but the candidate."""

    case: str
    tokens: int
    dtype: str = "bf16"
    backward: bool = False

    def key(self) -> dict[str, Any]:
        direction = "forward+backward" if self.backward else "forward"
        return {"case": self.case, "direction": direction, "dtype": self.dtype, "tokens": self.tokens}

    def problem(self, device: str, rehearse: bool) -> GpuProblem:
        return _KINDS[self.case](self.case, self.tokens, self.dtype, self.backward, device, rehearse)

    @cached_property
    def kind(self) -> type:
        return _KINDS[self.case]  # type: ignore[return-value]


def _area(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
