"""The ways to compute a feed-forward block that are timed beside ours: dense and factored stock torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.candidates import Missing, quicker_order
from kron_kernels.testing.ffn import (
    DENSE,
    FACTORS,
    FfnProblem,
    dense_ffn,
    factors,
    fused,
    two_products,
)
from kron_kernels.testing.layers import LayerProblem, Weights
from kron_kernels.testing.problem import Candidate


def dense_packed(problem: FfnProblem) -> Candidate:
    """Dense with both weights packed ahead for the library behind it: MKL in float32, oneDNN with GELU in bfloat16."""
    if problem.dtype == torch.float32:
        if not torch.backends.mkl.is_available():
            raise Missing("torch was built without MKL")

        def pack(pair: tuple[Weights, Weights], tokens: int) -> tuple[Tensor, ...]:
            reorder = torch.ops.mkl._mkl_reorder_linear_weight
            return tuple(tensor for each in pair for tensor in (reorder(each.weight, tokens), each.weight, each.bias))

        def block(x: Tensor, *operands: Tensor) -> Tensor:
            linear = torch.ops.mkl._mkl_linear
            hidden = F.gelu(linear(x, *operands[:3], x.shape[0]))
            return linear(hidden, *operands[3:], x.shape[0])

        return Candidate("dense, packed", block, pack, None)
    if not torch.backends.mkldnn.is_available():
        raise Missing("torch was built without oneDNN")

    def reorder(pair: tuple[Weights, Weights], tokens: int) -> tuple[Tensor, ...]:
        pack = torch.ops.mkldnn._reorder_linear_weight
        return tuple(tensor for each in pair for tensor in (pack(each.weight, tokens), each.bias))

    def pointwise(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(linear(x, weight1, bias1, "gelu", [], "none"), weight2, bias2, "none", [], "")

    return Candidate("dense, packed", pointwise, reorder, None)


def dense_compiled(_problem: FfnProblem) -> Candidate:
    """torch.compile of the dense block."""
    torch.compiler.reset()
    function = torch.compile(dense_ffn, fullgraph=True, dynamic=False)
    return Candidate("dense, compiled", function, DENSE.prepare, DENSE.differentiates)


def products(problem: FfnProblem) -> Candidate:
    """Stock torch on the factors: the order of each layer's two products that is quicker on this problem, and GELU."""
    first, second = (
        quicker_order(LayerProblem(case, problem.tokens, problem.dtype, problem.backward)).function
        for case in (problem.case.first, problem.case.second)
    )

    def block(x: Tensor, a1: Tensor, b1: Tensor, bias1: Tensor, a2: Tensor, b2: Tensor, bias2: Tensor) -> Tensor:
        return second(F.gelu(first(x, a1, b1, bias1)), a2, b2, bias2)

    return Candidate("matmul", block, factors, FACTORS)


def products_compiled(problem: FfnProblem) -> Candidate:
    """torch.compile of the same."""
    torch.compiler.reset()
    function = torch.compile(products(problem).function, fullgraph=True, dynamic=False)
    return Candidate("matmul, compiled", function, factors, FACTORS)


FFN_MAKERS: dict[str, Callable[[FfnProblem], Candidate]] = {
    "dense": lambda _problem: DENSE,
    "dense, packed": dense_packed,
    "dense, compiled": dense_compiled,
    "matmul": products,
    "matmul, compiled": products_compiled,
    "kron_matmul twice": two_products,
    "kron_kernels": fused,
}
COMPILED = ("dense, compiled", "matmul, compiled")
