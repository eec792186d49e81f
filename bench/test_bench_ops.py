"""Single ops under pytest-benchmark: ``pytest bench/``. Figures only: nothing is asserted about time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.baselines import op_candidate
from bench.suites.layers import ALL_CASES
from kron_kernels.testing.problems import OpProblem


@pytest.mark.parametrize("name", ["dense", "matmul", "kron_kernels"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("tokens", [1, 128, 1024])
@pytest.mark.parametrize("case", ALL_CASES)
def test_op(benchmark: Any, case: str, tokens: int, backward: bool, name: str) -> None:
    problem = OpProblem(ALL_CASES[case], tokens, torch.float32, backward)
    candidate = op_candidate(problem, name)
    assert problem.error(candidate) <= problem.tolerance(candidate)
    benchmark.group = f"{case}, {tokens} tokens" + (", backward" if backward else "")
    benchmark(problem.runner(candidate))
