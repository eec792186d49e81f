"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from kron_kernels import backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=backends.CPU_ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level of the CPU kernels in turn."""
    top = backends.set_cpu_isa("amx")
    if backends.set_cpu_isa(request.param) != request.param:
        backends.set_cpu_isa("amx")
        pytest.skip(f"{request.param} is not there: this machine and build go up to {top}")
    yield request.param
    backends.set_cpu_isa("amx")
