"""The ways to compute a Kronecker layer that are timed beside ours: tuned stock torch, and peers.

Each maker returns a :class:`Candidate`, or raises :class:`Missing` with the reason why it cannot run here.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels.testing.layers import (
    A_FIRST,
    B_FIRST,
    DENSE,
    MATERIALISED,
    OURS,
    LayerProblem,
    Weights,
)
from kron_kernels.testing.problem import Candidate

# FastKron is 8 to 100 times slower than dense with factors this large: timing it there would tell nothing new.
FASTKRON_LARGEST = 299
# FastKron brings an OpenMP runtime of its own, whose threads spin for a while after each call.
FASTKRON_REST_SECONDS = 0.02


class Missing(Exception):
    """The candidate cannot run here; the message says why."""


def dense_packed(problem: LayerProblem) -> Candidate:
    """Dense with the weight packed ahead for the library behind it: MKL in float32, oneDNN in bfloat16."""
    if problem.dtype == torch.float32:
        if not torch.backends.mkl.is_available():
            raise Missing("torch was built without MKL")

        def pack(weights: Weights, tokens: int) -> tuple[Tensor, ...]:
            packed = torch.ops.mkl._mkl_reorder_linear_weight(weights.weight, tokens)
            return packed, weights.weight, weights.bias

        def linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.shape[0])

        return Candidate("dense, packed", linear, pack, None)
    if not torch.backends.mkldnn.is_available():
        raise Missing("torch was built without oneDNN")

    def reorder(weights: Weights, tokens: int) -> tuple[Tensor, ...]:
        return torch.ops.mkldnn._reorder_linear_weight(weights.weight, tokens), weights.bias

    def pointwise(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return Candidate("dense, packed", pointwise, reorder, None)


def compiled(problem: LayerProblem) -> Candidate:
    """torch.compile of the two-product order that is quicker on this problem."""
    order = quicker_order(problem)
    torch.compiler.reset()
    function = torch.compile(order.function, fullgraph=True, dynamic=False)
    return Candidate("matmul, compiled", function, order.prepare, order.differentiates)


def quicker_order(problem: LayerProblem) -> Candidate:
    """The order of the two stock products that is quicker on this problem."""
    return min((B_FIRST, A_FIRST), key=lambda candidate: _quick_time(problem, candidate))


def fastkron(problem: LayerProblem) -> Candidate:
    """FastKron's CPU build through its torch binding; float32 and forward only."""
    if problem.dtype != torch.float32:
        raise Missing("float32 only")
    if problem.backward:
        raise Missing("no fused backward")
    if max(*problem.case.a, *problem.case.b) > FASTKRON_LARGEST:
        raise Missing(f"factors above {FASTKRON_LARGEST} are 8 to 100 times slower than dense there")
    gemkm = module("pyfastkron.fastkrontorch").gemkm

    def prepare(weights: Weights, _tokens: int) -> tuple[Tensor, ...]:
        return weights.a.t().contiguous(), weights.b.t().contiguous(), weights.bias

    def product(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return gemkm(x, [a, b]) + bias

    return Candidate("FastKron", product, prepare, None, FASTKRON_REST_SECONDS)


def lycoris(_problem: LayerProblem) -> Candidate:
    """LyCORIS's LoKr product, the path it takes on a CPU."""
    bypass = module("lycoris.functional.lokr").kron_bypass

    def product(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return bypass(x, a, None, None, b, None, None, None) + bias

    return Candidate("LyCORIS", product, OURS.prepare, OURS.differentiates)


def peft(_problem: LayerProblem) -> Candidate:
    """PEFT's LoKr: the Kronecker product built on every call, then a dense layer."""
    make_kron = module("peft.tuners.lokr.layer").make_kron

    def product(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, make_kron(a, b), bias)

    return Candidate("PEFT", product, OURS.prepare, OURS.differentiates)


def _always(candidate: Candidate) -> Callable[[LayerProblem], Candidate]:
    return lambda _problem: candidate


MAKERS: dict[str, Callable[[LayerProblem], Candidate]] = {
    "dense": _always(DENSE),
    "dense, packed": dense_packed,
    "torch.kron + linear": _always(MATERIALISED),
    "matmul B first": _always(B_FIRST),
    "matmul A first": _always(A_FIRST),
    "matmul, compiled": compiled,
    "LyCORIS": lycoris,
    "PEFT": peft,
    "FastKron": fastkron,
    "kron_kernels": _always(OURS),
}
# FastKron runs in a process of its own: merely loading it changes how torch's threads behave.
MAIN = tuple(name for name in MAKERS if name != "FastKron")
ALONE = ("dense", "FastKron", "kron_kernels")


def module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error


def _quick_time(problem: LayerProblem, candidate: Candidate, repeats: int = 4) -> float:
    run = problem.runner(candidate)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
