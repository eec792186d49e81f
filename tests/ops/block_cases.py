"""Operands of whole blocks on shapes of the shared table: feed-forward, add and norm."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels.schemas import reference
from kron_kernels.testing import shapes

# (A, B) of the first layer, (A, B) of the second.
FFN_SHAPES = {
    "k8": (shapes.SHAPES["k8-w1-small"], shapes.SHAPES["k8-w2-small"]),
    "k21": (((16, 2), (24, 48)), ((2, 16), (48, 24))),
    "four-rows": (shapes.SHAPES["k21-w1-small"], shapes.SHAPES["k21-w2-small"]),
    "one-row": (((4, 1), (40, 24)), ((1, 4), (24, 40))),
    "balanced": (shapes.SHAPES["balanced-expand"], shapes.SHAPES["balanced-contract"]),
    "tiny-right": (((48, 24), (4, 2)), ((24, 48), (2, 4))),
    "odd": (((7, 2), (33, 17)), ((3, 7), (19, 33))),
    "three": (((6, 3), (20, 24)), ((3, 6), (24, 20))),
    "unchained": (((6, 2), (10, 12)), ((2, 10), (12, 6))),
}


@dataclass(frozen=True)
class FfnCase:
    shape: str
    tokens: int
    terms: int = 1
    layout: str = "contiguous"
    activation: str | None = "gelu"
    norm: bool = False

    @property
    def id(self) -> str:
        norm = "-norm" if self.norm else ""
        return f"{self.shape}-T{self.tokens}-S{self.terms}-{self.layout}-{self.activation}{norm}"


_TOKENS = (0, 1, 2, 17, 33, 100)
_ACTIVATIONS = (None, *reference.ACTIVATIONS)
FFN_CASES: tuple[FfnCase, ...] = tuple(
    dict.fromkeys(
        (
            *(FfnCase(shape, tokens, norm=tokens % 2 == 1) for shape in FFN_SHAPES for tokens in _TOKENS),
            *(FfnCase(shape, 17, 2, norm=True) for shape in FFN_SHAPES),
            *(FfnCase(shape, 33, activation=name) for shape in ("k8", "balanced", "odd") for name in _ACTIVATIONS),
            *(FfnCase(shape, 33, 1, layout) for shape in ("k21", "balanced", "odd") for layout in shapes.LAYOUTS[1:]),
            FfnCase("k8", 400),
        )
    )
)


@dataclass(frozen=True)
class Ffn:
    """``x (T, n)``, two pairs of stacked factors with their biases, ``grad (T, m)`` and the operands of a norm."""

    x: Tensor
    a1: Tensor
    b1: Tensor
    bias1: Tensor
    a2: Tensor
    b2: Tensor
    bias2: Tensor
    grad: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def layers(self) -> tuple[Tensor, ...]:
        return self.x, self.a1, self.b1, self.bias1, self.a2, self.b2, self.bias2

    @property
    def norm(self) -> tuple[Tensor, Tensor, Tensor, float]:
        return self.residual, self.weight, self.bias, EPS


EPS = 1e-5


def make_ffn(case: FfnCase, dtype: torch.dtype) -> Ffn:
    """Operands with outputs of order one, laid out as the case says."""
    first_shape, second_shape = FFN_SHAPES[case.shape]
    first = _operands(first_shape, case, dtype, 0)
    second = _operands(second_shape, case, dtype, 1)
    return Ffn(
        first.x,
        first.a,
        first.b,
        first.bias,
        second.a,
        second.b,
        second.bias,
        second.grad,
        *norm_operands(second.grad, dtype),
    )


def _operands(shape: tuple[shapes.Pair, shapes.Pair], case: FfnCase, dtype: torch.dtype, seed: int) -> shapes.Operands:
    return shapes.make_operands(shape, case.tokens, case.terms, case.layout, dtype=dtype, seed=seed)


def norm_operands(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A residual like ``like (T, m)``, and the weight and bias (m,) of a norm."""
    generator = torch.Generator().manual_seed(7)
    m = like.shape[-1]
    sizes = (tuple(like.shape), (m,), (m,))
    residual, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return residual, weight, bias


def ffn(o: Ffn, activation: str | None, norm: bool) -> Tensor:
    """The block by plain torch, in the dtype of its operands."""
    y = reference.kron_ffn(*o.layers, activation)
    return y if not norm else F.layer_norm(o.residual + y, o.weight.shape, o.weight, o.bias, EPS)


def double(o: Ffn) -> Ffn:
    return Ffn(*(tensor.double() for tensor in vars(o).values()))


@functools.cache
def ffn_case(case: FfnCase, dtype: torch.dtype) -> tuple[Ffn, Tensor, Tensor]:
    """Operands, output of torch in the same dtype, and the fp64 oracle; made once for all tests of a run."""
    o = make_ffn(case, dtype)
    return o, ffn(o, case.activation, case.norm), ffn(double(o), case.activation, case.norm)


@functools.cache
def ffn_gradients(case: FfnCase, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of the seven operands by autograd: in the same dtype, and in fp64."""
    o = make_ffn(case, dtype)

    def of(one: Ffn) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in one.layers]
        return torch.autograd.grad(reference.kron_ffn(*leaves, case.activation), leaves, one.grad)

    return of(o), of(double(o))


# Terms, p, k of rows of p * k values, and whether position and type rows and a norm follow.
EMBEDDINGS = (
    (1, 12, 8, True),
    (2, 12, 16, True),
    (3, 5, 3, False),
    (1, 64, 12, True),
    (1, 7, 1, True),
    (2, 9, 40, False),
)


@dataclass(frozen=True)
class Embedding:
    """Operands of the op ``kron_embedding``, in its order; ``grad (3, 21, p * k)`` of the output."""

    operands: tuple[Any, ...]
    grad: Tensor

    def double(self) -> Embedding:
        return Embedding(tuple(map(_double, self.operands)), self.grad.double())


def _double(operand: Any) -> Any:
    return operand.double() if isinstance(operand, Tensor) and operand.is_floating_point() else operand


def make_embedding(terms: int, p: int, k: int, whole: bool, dtype: torch.dtype) -> Embedding:
    """63 tokens, of a table of 50 rows; positions broadcast, types are int32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    m = p * k
    ids = torch.randint(0, 50, (3, 21), generator=generator)
    a, b = normal(terms, 50, p), normal(terms, 1, k)
    positions, types, weight, bias = normal(30, m), normal(2, m), normal(m), normal(m)
    rest: tuple[Any, ...] = (None,) * 6
    if whole:
        type_ids = torch.randint(0, 2, (3, 21), generator=generator, dtype=torch.int32)
        rest = (torch.arange(21), positions, type_ids, types, weight, bias)
    return Embedding((ids, a, b, *rest, EPS), normal(3, 21, m))


@functools.cache
def embedding_case(terms: int, p: int, k: int, whole: bool, dtype: torch.dtype) -> tuple[Embedding, Tensor, Tensor]:
    """Operands, output of torch in the same dtype, and the fp64 oracle; made once for all tests of a run."""
    o = make_embedding(terms, p, k, whole, dtype)
    return o, reference.kron_embedding(*o.operands), reference.kron_embedding(*o.double().operands)


@functools.cache
def embedding_gradients(
    terms: int, p: int, k: int, whole: bool, dtype: torch.dtype
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Gradients of a, b, the tables and the norm by autograd: in the same dtype, and in fp64; None of what is not."""
    o = make_embedding(terms, p, k, whole, dtype)

    def of(one: Embedding) -> tuple[Tensor | None, ...]:
        tensors = list(one.operands)
        places = [place for place in (1, 2, 4, 6, 7, 8) if tensors[place] is not None]
        leaves = [tensors[place].detach().requires_grad_() for place in places]
        for place, leaf in zip(places, leaves, strict=True):
            tensors[place] = leaf
        gradients = torch.autograd.grad(reference.kron_embedding(*tensors), leaves, one.grad)
        found = dict(zip(places, gradients, strict=True))
        return tuple(found.get(place) for place in (1, 2, 4, 6, 7, 8))

    return of(o), of(o.double())
