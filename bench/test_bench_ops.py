"""Single ops under pytest-benchmark: `pytest bench/`. Figures only, nothing is asserted about time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kron_kernels.testing.layers import (
    A_FIRST,
    B_FIRST,
    CASES,
    DENSE,
    OURS,
    LayerProblem,
)
from kron_kernels.testing.problem import TOLERANCE, Candidate

TOKENS = (1, 128, 1024)


@pytest.mark.parametrize("candidate", [DENSE, B_FIRST, A_FIRST, OURS], ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark: Any, case: str, tokens: int, candidate: Candidate) -> None:
    _bench(benchmark, LayerProblem(CASES[case], tokens, torch.float32), candidate)


@pytest.mark.parametrize("candidate", [DENSE, OURS], ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("case", CASES)
def test_forward_backward(benchmark: Any, case: str, candidate: Candidate) -> None:
    _bench(benchmark, LayerProblem(CASES[case], 1024, torch.float32, backward=True), candidate)


def _bench(benchmark: Any, problem: LayerProblem, candidate: Candidate) -> None:
    assert problem.error(candidate) <= TOLERANCE[problem.dtype]
    benchmark.group = f"{problem.case.name}, {problem.tokens} tokens" + (", backward" if problem.backward else "")
    benchmark(problem.runner(candidate))
