"""The one table of shapes, dtypes and layouts that tests and benchmarks of the kernels run over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (m1, n1), (m2, n2): A (x) B. The names say which layer of a compressed BERT-base has the form.
SHAPES = {
    "k8-attention": ((384, 384), (2, 2)),
    "k21-attention": ((384, 48), (2, 16)),
    "k8-attention-small": ((48, 48), (2, 2)),
    "k21-attention-small": ((96, 12), (2, 16)),
    "k8-w1-small": ((8, 2), (96, 96)),
    "k8-w2-small": ((2, 8), (96, 96)),
    "k21-w1-small": ((64, 4), (12, 48)),
    "k21-w2-small": ((4, 64), (48, 12)),
    "balanced": ((24, 24), (32, 32)),
    "balanced-expand": ((64, 16), (48, 48)),
    "balanced-contract": ((16, 64), (48, 48)),
    "odd": ((3, 5), (7, 2)),
    "odd-wide": ((17, 13), (19, 33)),
    "scalar": ((1, 1), (1, 1)),
    "row-b": ((37, 20), (1, 3)),
    "column-b": ((20, 37), (3, 1)),
    "row-a": ((1, 21), (35, 4)),
    "column-a": ((21, 1), (4, 35)),
    "plain-gemm": ((70, 50), (1, 1)),
}

LAYOUTS = ("contiguous", "strided-rows", "transposed-x", "misaligned", "transposed-factors", "expanded")


@dataclass(frozen=True)
class Case:
    shape: str
    tokens: int
    terms: int = 1
    layout: str = "contiguous"
    bias: bool = True

    @property
    def id(self) -> str:
        bias = "" if self.bias else "-nobias"
        return f"{self.shape}-T{self.tokens}-S{self.terms}-{self.layout}{bias}"


_TOKENS = (0, 1, 2, 5, 17, 33, 64, 100)

_LISTED = (
    # Every shape at two numbers of tokens and of terms, the next shape at other ones.
    *(
        Case(shape, _TOKENS[(index + step) % len(_TOKENS)], terms=1 + (index + step) % 4 * (step // 3), bias=step == 0)
        for index, shape in enumerate(SHAPES)
        for step in (0, 3)
    ),
    *(Case(shape, tokens) for shape in ("k8-attention-small", "balanced", "odd-wide") for tokens in _TOKENS),
    *(Case(shape, 33, terms) for shape in ("odd", "k8-w1-small", "k8-w2-small") for terms in (2, 3, 4)),
    *(Case(shape, 17, 2, layout) for shape in ("odd", "k21-attention-small", "balanced") for layout in LAYOUTS[1:]),
    Case("k8-attention", 70, 2),
    Case("k21-attention", 129),
    Case("k8-w1-small", 300),
    Case("k8-w2-small", 300),
)
CASES: tuple[Case, ...] = tuple(dict.fromkeys(_LISTED))


@dataclass(frozen=True)
class Operands:
    """``x (T, n)``, ``a (S, m1, n1)``, ``b (S, m2, n2)``, ``bias (m,)`` or None, ``grad (T, m)`` of the output."""

    x: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    grad: Tensor

    def double(self) -> Operands:
        bias = None if self.bias is None else self.bias.double()
        return Operands(self.x.double(), self.a.double(), self.b.double(), bias, self.grad.double())


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Operands:
    """Operands with outputs of order one, laid out as the case says."""
    return make_operands(SHAPES[case.shape], case.tokens, case.terms, case.layout, case.bias, dtype, seed)


def make_operands(
    shape: tuple[Pair, Pair],
    tokens: int,
    terms: int = 1,
    layout: str = "contiguous",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Operands:
    """Operands of a product of this shape, ``((m1, n1), (m2, n2))``, in one of ``LAYOUTS``."""
    (m1, n1), (m2, n2) = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x, grad = normal(tokens, n1 * n2), normal(tokens, m1 * m2)
    a, b = normal(terms, m1, n1, scale=n1**-0.5), normal(terms, m2, n2, scale=n2**-0.5)
    if layout == "strided-rows":
        x, grad = _columns(x), _columns(grad)
    elif layout == "transposed-x":
        x, grad = x.T.contiguous().T, grad.T.contiguous().T
    elif layout == "misaligned":
        x, a, b, grad = _shifted(x), _shifted(a), _shifted(b), _shifted(grad)
    elif layout == "transposed-factors":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    elif layout == "expanded":
        x, a, grad = x[:1].expand(x.shape), a[:1].expand(a.shape), grad[:1, :1].expand(grad.shape)
    return Operands(x, a, b, normal(m1 * m2) if bias else None, grad)


def _columns(matrix: Tensor) -> Tensor:
    """The same matrix as a block of columns of a wider one: rows lie further apart than their length."""
    rows, columns = matrix.shape
    wide = matrix.new_full((rows, columns + 5), float("nan"))
    wide[:, 2 : 2 + columns] = matrix
    return wide[:, 2 : 2 + columns]


def _shifted(tensor: Tensor) -> Tensor:
    """The same tensor starting one element into its storage, off every vector alignment."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
