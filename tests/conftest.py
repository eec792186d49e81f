"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from kron_kernels import _backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_backends.CPU_ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level of the CPU kernels in turn."""
    top = _backends.set_cpu_isa("amx")
    if _backends.set_cpu_isa(request.param) != request.param:
        _backends.set_cpu_isa("amx")
        pytest.skip(f"{request.param} is not there: this machine and build go up to {top}")
    yield request.param
    _backends.set_cpu_isa("amx")
