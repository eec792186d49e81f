"""Problems that stand for what users run: what is compiled ahead, checked and tuned. Sizes of KroneckerBERT and kin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Device, Launch, recording

Pair = tuple[int, int]

# "tf32": float32 whose products may be rounded, as torch's setting says.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """``sum_s A_s (x) B_s`` with ``A_s (m1, n1)``, ``B_s (m2, n2)``."""

    a: Pair
    b: Pair
    terms: int = 1

    @property
    def shape(self) -> Pair:
        """``(m, n)`` of the dense weight."""
        return self.a[0] * self.b[0], self.a[1] * self.b[1]

    def factors(self, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        scale = self.terms**-0.5
        a = normal(self.terms, *self.a, scale=scale * self.a[1] ** -0.5)
        return a, normal(self.terms, *self.b, scale=self.b[1] ** -0.5)

    @classmethod
    def parse(cls, text: str) -> Layer:
        """Of "384x384,2x2", or "384x768,2x4,4" with the number of terms. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)x(\d+),(\d+)x(\d+)(?:,(\d+))?", text)
        numbers = [int(number or 1) for number in found.groups()] if found else []
        if found is None or min(numbers) < 1:
            raise ValueError(f"shape: expected m1xn1,m2xn2 or m1xn1,m2xn2,terms, got {text!r}")
        return cls((numbers[0], numbers[1]), (numbers[2], numbers[3]), numbers[4])


# "k8", "k21": table 1 of KroneckerBERT (NAACL 2022). "tq": TQCompressor's feed-forward of GPT-2, four terms.
LAYERS = {
    "k8-attention": Layer((384, 384), (2, 2)),
    "k8-w1": Layer((8, 2), (384, 384)),
    "k8-w2": Layer((2, 8), (384, 384)),
    "k21-attention": Layer((384, 48), (2, 16)),
    "k21-w1": Layer((16, 2), (192, 384)),
    "k21-w2": Layer((2, 16), (384, 192)),
    "tq-w1": Layer((768, 384), (4, 2), 4),
    "tq-w2": Layer((384, 768), (2, 4), 4),
    "balanced": Layer((24, 24), (32, 32)),
    "balanced-w1": Layer((64, 16), (48, 48)),
    "balanced-w2": Layer((16, 64), (48, 48)),
}
FFNS = {
    "k8-ffn": ("k8-w1", "k8-w2"),
    "k21-ffn": ("k21-w1", "k21-w2"),
    "balanced-ffn": ("balanced-w1", "balanced-w2"),
}
QKVS = {"k8-qkv": "k8-attention", "k21-qkv": "k21-attention", "balanced-qkv": "balanced"}
# Rows, columns of A and of B.
EMBEDDINGS = {"k8-embedding": (30522, 96, 8), "k21-embedding": (30522, 48, 16)}
POSITIONS, TYPES = 512, 2


@dataclass(frozen=True)
class Problem:
    """A call of one op; ``name`` is of LAYERS or of the other tables."""

    name: str
    op: str
    dtype: str
    tokens: int

    @property
    def id(self) -> str:
        return f"{self.name} {self.op} {self.dtype} T{self.tokens}"

    def operands(self, device: str) -> tuple[Any, ...]:
        """The op's arguments, with results of order one; on "meta" tensors without values."""
        normal = _normal(DTYPES[self.dtype], device)
        return _OPERANDS[self.op](self, normal)


def problems(
    ops: Iterable[str],
    names: Iterable[str] = (*LAYERS, *FFNS, *QKVS, *EMBEDDINGS),
    dtypes: Iterable[str] = tuple(DTYPES),
    tokens: Iterable[int] = (128, 4096),
) -> Iterator[Problem]:
    """All calls of the ops on the names that they are for."""
    tables = {op: table for op, table in _TABLES.items() if op in set(ops)}
    for name in names:
        for op, table in tables.items():
            if name in table:
                yield from (Problem(name, op, dtype, count) for dtype in dtypes for count in tokens)


def record(problem: Problem, implementations: Mapping[str, Callable[..., Any]], device: Device) -> list[Launch]:
    """The launches that a problem comes to on a device that need not be there."""
    with recording(device) as launches:
        run(problem, problem.operands("meta"), implementations)
    return launches


def run(problem: Problem, operands: tuple[Any, ...], implementations: Mapping[str, Callable[..., Any]]) -> Any:
    """The op's result, with torch's float32 products set as the problem wants them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if problem.dtype == "tf32" else "highest")
    try:
        return implementations[problem.op](*operands)
    finally:
        torch.set_float32_matmul_precision(before)


def _normal(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device) * scale

    return normal


def _mm(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    layer = LAYERS[problem.name]
    m, n = layer.shape
    return normal(problem.tokens, n), *layer.factors(normal), normal(m), 1 if problem.name.endswith("w1") else 0


def _mm_backward(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    layer = LAYERS[problem.name]
    m, n = layer.shape
    return normal(problem.tokens, m), normal(problem.tokens, n), *layer.factors(normal), 0b1111


def _mm_add(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    layer = LAYERS[problem.name]
    m, n = layer.shape
    return normal(problem.tokens, m), normal(problem.tokens, n), *layer.factors(normal), 0.5


def _mm_norm(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, a, b, bias, _ = _mm(problem, normal)
    m = bias.shape[0]
    return x, a, b, bias, normal(problem.tokens, m), normal(m), normal(m), 1e-12


def _ffn(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    first, second = (LAYERS[name] for name in FFNS[problem.name])
    x = normal(problem.tokens, first.shape[1])
    pairs = (*first.factors(normal), normal(first.shape[0]), *second.factors(normal), normal(second.shape[0]))
    return x, *pairs, 1, None, None, None, 1e-12


def _ffn_backward(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    x, a1, b1, bias1, a2, b2, bias2, *_ = _ffn(problem, normal)
    return normal(problem.tokens, bias2.shape[0]), x, a1, b1, bias1, a2, b2, 1, 0b1111111


def _qkv(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    layer = LAYERS[QKVS[problem.name]]
    a, b = zip(*(layer.factors(normal) for _ in range(3)), strict=True)
    return normal(problem.tokens, layer.shape[1]), list(a), list(b), [normal(layer.shape[0]) for _ in range(3)], []


def _embedding(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    rows, p, k = EMBEDDINGS[problem.name]
    a, width = normal(1, rows, p), p * k
    # Words repeat: that is what a sum over them has to cope with.
    ids = torch.arange(problem.tokens, device=a.device) * 7919 % (rows // 8)
    positions = torch.arange(problem.tokens, device=a.device) % POSITIONS
    types = torch.zeros_like(ids)
    tables = (positions, normal(POSITIONS, width), types, normal(TYPES, width))
    return ids, a, normal(1, 1, k), *tables, normal(width), normal(width), 1e-12


def _embedding_backward(problem: Problem, normal: Callable[..., Tensor]) -> tuple[Any, ...]:
    ids, a, b, *tables, weight, _bias, eps = _embedding(problem, normal)
    return normal(problem.tokens, weight.shape[0]), ids, a, b, *tables, weight, eps, 0b111111


_OPERANDS: dict[str, Callable[[Problem, Callable[..., Tensor]], tuple[Any, ...]]] = {
    "kron_matmul": _mm,
    "kron_matmul_backward": _mm_backward,
    "kron_addmm": _mm_add,
    "kron_matmul_norm": _mm_norm,
    "kron_ffn": _ffn,
    "kron_ffn_backward": _ffn_backward,
    "kron_qkv": _qkv,
    "kron_embedding": _embedding,
    "kron_embedding_backward": _embedding_backward,
}
_TABLES: dict[str, Mapping[str, Any]] = {
    "kron_matmul": LAYERS,
    "kron_matmul_backward": LAYERS,
    "kron_addmm": {"k8-attention": None, "balanced": None},
    "kron_matmul_norm": {"k8-attention": None, "k21-attention": None, "balanced": None},
    "kron_ffn": FFNS,
    "kron_ffn_backward": FFNS,
    "kron_qkv": QKVS,
    "kron_embedding": EMBEDDINGS,
    "kron_embedding_backward": EMBEDDINGS,
}
