"""The ways to compute that are timed on a GPU: ours by backend, cuBLAS, stock products, torch.compile, LyCORIS."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.candidates import Missing, module
from bench.gpu_problems import EPS, EmbeddingProblem, FfnProblem, GpuProblem, LayerProblem, QkvProblem, Weights
from kron_kernels import kron_embedding, kron_ffn, kron_matmul, kron_qkv
from kron_kernels.backends import select
from kron_kernels.backends.devices import arch
from kron_kernels.testing.problem import Candidate

Maker = Callable[[Any], Candidate]

# Ours: whichever backend the package takes, and each by name.
BACKENDS: dict[str, str | None] = {"kron_kernels": None, "triton": "triton", "cuda": "cuda"}
_FACTORS = ("a", "b", "bias")
_BLOCK = ("a1", "b1", "bias1", "a2", "b2", "bias2")


def b_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """``sum_s A_s (X B_s^T)`` by two stock products a term."""
    grid = x.reshape(-1, a.shape[2], b.shape[2])
    y = sum(torch.matmul(left, torch.matmul(grid, right.mT)) for left, right in zip(a, b, strict=True))
    return y.reshape(x.shape[0], -1) + bias


def a_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """``sum_s (A_s X) B_s^T`` likewise."""
    grid = x.reshape(-1, a.shape[2], b.shape[2])
    y = sum(torch.matmul(torch.matmul(left, grid), right.mT) for left, right in zip(a, b, strict=True))
    return y.reshape(x.shape[0], -1) + bias


def quicker_product(x: Tensor, weights: Weights) -> Callable[..., Tensor]:
    """The order of the two products that takes less time forward on x."""

    def seconds(function: Callable[..., Tensor]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            function(x, *weights[:3])
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.inference_mode():
        return min((b_first, a_first), key=seconds)


def _factors(weights: Weights, _tokens: int) -> tuple[Tensor, ...]:
    return weights[:3]


def _dense(weights: Weights, _tokens: int) -> tuple[Tensor, ...]:
    return weights.weight, weights.bias


def _block_factors(pair: tuple[Weights, Weights], _tokens: int) -> tuple[Tensor, ...]:
    return (*pair[0][:3], *pair[1][:3])


def _block_dense(pair: tuple[Weights, Weights], _tokens: int) -> tuple[Tensor, ...]:
    return tuple(tensor for layer in pair for tensor in (layer.weight, layer.bias))


def dense_ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def products(problem: LayerProblem) -> Candidate:
    """Two stock products in the better order."""
    return Candidate("matmul", quicker_product(problem.x, problem.weights[0]), _factors, _FACTORS)


def products_ffn(problem: FfnProblem) -> Candidate:
    """Two stock products a layer, each in its better order, with GELU between."""
    first, second = problem.weights[0]
    hidden = problem.normal(problem.tokens, first.bias.shape[0])
    up, down = quicker_product(problem.x, first), quicker_product(hidden, second)

    def block(x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor, a2: Tensor, b2: Tensor, bias2: Tensor) -> Tensor:
        return down(F.gelu(up(x, a1, b1, bias1)), a2, b2, bias2)

    return Candidate("matmul", block, _block_factors, _BLOCK)


def products_qkv(problem: QkvProblem) -> Candidate:
    """Two stock products a projection, in their better order."""
    product = quicker_product(problem.x, problem.weights[0][0])

    def each(x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(product(x, *operands[start : start + 3]) for start in (0, 3, 6))

    return Candidate("matmul", each, _qkv_factors, None)  # type: ignore[arg-type]


def lycoris(problem: LayerProblem) -> Candidate:
    """LyCORIS 4's fused LoKr product, where it takes the shape."""
    if problem.layers[0].terms > 1:
        raise Missing("one term only")
    lokr = module("lycoris.functional.lokr")
    if not hasattr(lokr, "_apply_supported"):
        raise Missing("a version without fused kernels")
    a, b = problem.weights[0].a[0], problem.weights[0].b[0]
    if not lokr._apply_supported(a, None, None, b, None, None, None):
        raise Missing(f"its fused kernel takes factors of at most {lokr._apply_factor_cap()}")

    def fused(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return lokr.kron_bypass(x, a[0], None, None, b[0], None, None, None, backend="triton") + bias

    return Candidate("LyCORIS", fused, _factors, _FACTORS)


def compiled(name: str, maker: Maker) -> Maker:
    """torch.compile of a candidate, for the problem's own shape."""

    def make(problem: GpuProblem) -> Candidate:
        candidate = maker(problem)
        torch.compiler.reset()
        function = torch.compile(candidate.function, fullgraph=True, dynamic=False)
        return Candidate(name, function, candidate.prepare, candidate.differentiates)

    return make


def _ours(name: str, function: Callable[..., Any], prepare: Any, differentiates: tuple[str, ...] | None) -> Maker:
    def make(problem: GpuProblem) -> Candidate:
        backend = BACKENDS[name]
        if backend is not None:
            ops = (problem.op, f"{problem.op}_backward") if problem.backward else (problem.op,)
            chip = arch(0) if problem.device == "cuda" else None
            try:
                for op in ops:
                    select.choose(op, problem.products(), problem.dtype, problem.tokens, chip, backend)
            except RuntimeError as refusal:
                raise Missing(str(refusal)) from None
        return Candidate(name, functools.partial(function, backend=backend), prepare, differentiates)

    return make


def _ours_by_backend(
    function: Callable[..., Any], prepare: Any, differentiates: tuple[str, ...] | None
) -> dict[str, Maker]:
    return {name: _ours(name, function, prepare, differentiates) for name in BACKENDS}


def _always(candidate: Candidate) -> Maker:
    return lambda _problem: candidate


_DENSE_LAYER = Candidate("dense", F.linear, _dense, ("weight", "bias"))
_DENSE_FFN = Candidate("dense", dense_ffn, _block_dense, ("weight1", "bias1", "weight2", "bias2"))

LAYER_MAKERS: dict[str, Maker] = {
    "dense": _always(_DENSE_LAYER),
    "matmul": products,
    "matmul, compiled": compiled("matmul, compiled", products),
    "LyCORIS": lycoris,
    **_ours_by_backend(kron_matmul, _factors, _FACTORS),
}
FFN_MAKERS: dict[str, Maker] = {
    "dense": _always(_DENSE_FFN),
    "dense, compiled": compiled("dense, compiled", _always(_DENSE_FFN)),
    "matmul": products_ffn,
    "matmul, compiled": compiled("matmul, compiled", products_ffn),
    **_ours_by_backend(kron_ffn, _block_factors, _BLOCK),
}


def _qkv_dense(layers: tuple[Weights, ...], _tokens: int) -> tuple[Tensor, ...]:
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _qkv_factors(layers: tuple[Weights, ...], _tokens: int) -> tuple[Tensor, ...]:
    return tuple(tensor for layer in layers for tensor in layer[:3])


def _qkv(x: Tensor, *operands: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    return kron_qkv(x, operands[0::3], operands[1::3], operands[2::3], backend=backend)


QKV_MAKERS: dict[str, Maker] = {
    # One product with all three weights.
    "dense": _always(Candidate("dense", F.linear, _qkv_dense, None)),
    "matmul": products_qkv,
    **_ours_by_backend(_qkv, _qkv_factors, None),
}


def _embedding_dense(problem: EmbeddingProblem) -> Candidate:
    def embed(ids: Tensor, table: Tensor, positions: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        added = F.embedding(problem.positions, positions) + F.embedding(problem.types, types)
        return F.layer_norm(F.embedding(ids, table) + added, weight.shape, weight, bias, EPS)

    return Candidate("dense", embed, lambda weights, _tokens: weights[2:], None)


def _embedding(name: str) -> Maker:
    def make(problem: EmbeddingProblem) -> Candidate:
        def embed(
            ids: Tensor,
            a: Tensor,
            b: Tensor,
            positions: Tensor,
            types: Tensor,
            weight: Tensor,
            bias: Tensor,
            *,
            backend: str | None,
        ) -> Tensor:
            return kron_embedding(
                ids,
                a,
                b,
                position_ids=problem.positions,
                position_weight=positions,
                type_ids=problem.types,
                type_weight=types,
                norm_weight=weight,
                norm_bias=bias,
                eps=EPS,
                backend=backend,
            )

        def prepare(weights: tuple[Tensor, ...], _tokens: int) -> tuple[Tensor, ...]:
            return (*weights[:2], *weights[3:])

        return _ours(name, embed, prepare, None)(problem)

    return make


EMBEDDING_MAKERS: dict[str, Maker] = {"dense": _embedding_dense, **{name: _embedding(name) for name in BACKENDS}}
_MAKERS: dict[type, Mapping[str, Maker]] = {
    LayerProblem: LAYER_MAKERS,
    FfnProblem: FFN_MAKERS,
    QkvProblem: QKV_MAKERS,
    EmbeddingProblem: EMBEDDING_MAKERS,
}


def makers_of(kind: type) -> Mapping[str, Maker]:
    """The makers of candidates by name, for a class of problems."""
    return _MAKERS[kind]


def is_slow(name: str, kind: type) -> bool:
    """Whether making a candidate takes far longer than timing it, and no other is compared with it."""
    return name == "matmul, compiled" or (name == "dense, compiled" and kind is not FfnProblem)
