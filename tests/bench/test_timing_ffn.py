"""The feed-forward blocks that are timed: every way is right, and a wrong one shows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.candidates import Missing
from bench.ffn_candidates import COMPILED, FFN_MAKERS
from kron_kernels.testing.compare import compare
from kron_kernels.testing.ffn import (
    CASES,
    DENSE,
    FACTORS,
    FfnCase,
    FfnProblem,
    fused,
)
from kron_kernels.testing.layers import LayerCase
from kron_kernels.testing.problem import TOLERANCE

SMALL = FfnCase("small", LayerCase("w1", (8, 2), (6, 4)), LayerCase("w2", (2, 8), (4, 6)))


def test_case_counts_both_layers() -> None:
    case = CASES["balanced-ffn"]
    assert case.shape == (768, 768)
    assert case.dense_macs == 2 * 768 * 3072
    # 16 * 48 values: (48 x 48) for each of 16 rows, then (64 x 16) for each of 48 columns; the way back costs the same.
    assert case.macs == 2 * (16 * 48 * 48 + 64 * 16 * 48)
    assert case.saving == pytest.approx(27.43, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", [name for name in FFN_MAKERS if name not in COMPILED])
def test_every_way_is_right(name: str, backward: bool, dtype: torch.dtype) -> None:
    problem = FfnProblem(SMALL, 16, dtype, backward, copies=2)
    try:
        candidate = FFN_MAKERS[name](problem)
    except Missing as missing:
        pytest.skip(str(missing))
    if problem.refusal(candidate):
        assert name == "dense, packed"
        return
    assert problem.error(candidate) <= TOLERANCE[dtype]
    run = problem.runner(candidate)
    first, second, third = run(), run(), run()
    pick = (lambda result: result[0]) if backward else (lambda result: result)
    assert torch.equal(pick(first), pick(third)), "the copies take turns"
    assert not torch.equal(pick(first), pick(second)), "the copies differ"


def test_ours_gets_packed_factors_without_gradients_only() -> None:
    forward, training = (FfnProblem(SMALL, 4, torch.float32, backward) for backward in (False, True))
    assert len(fused(forward).prepare(forward.weights[0], 4)) == 8
    assert len(fused(training).prepare(training.weights[0], 4)) == 6


def test_reference_holds_all_that_a_candidate_may_give() -> None:
    problem = FfnProblem(SMALL, 4, torch.float32, backward=True)
    assert set(problem.reference()) == {"y", "x", *FACTORS, *(DENSE.differentiates or ())}


@pytest.mark.parametrize("position", range(5))
def test_a_wrong_gradient_shows(position: int) -> None:
    class Damaged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return DENSE.function(*inputs)

        @staticmethod
        def backward(ctx, grad):
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                gradients = list(torch.autograd.grad(DENSE.function(*leaves), leaves, grad))
            gradients[position] = gradients[position] * 1.01
            return tuple(gradients)

    problem = FfnProblem(SMALL, 7, torch.float32, backward=True)
    damaged = dataclasses.replace(DENSE, function=Damaged.apply)
    assert problem.error(damaged) > TOLERANCE[torch.float32]


def test_a_block_without_its_activation_is_wrong() -> None:
    problem = FfnProblem(SMALL, 7, torch.float32)
    linear = dataclasses.replace(DENSE, name="linear", function=lambda x, w1, b1, w2, b2: ((x @ w1.T + b1) @ w2.T) + b2)
    results = compare(problem, [DENSE, linear], seconds=0.002)
    assert [result.status for result in results] == ["ok", "wrong"]


@pytest.mark.compile
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_ways_are_right(name: str) -> None:
    problem = FfnProblem(SMALL, 16, torch.float32)
    assert problem.error(FFN_MAKERS[name](problem)) <= TOLERANCE[torch.float32]
