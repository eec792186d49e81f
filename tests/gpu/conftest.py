"""Tests on a GPU: skipped where there is none.

``KRON_KERNELS_GPU_TESTS=cpu`` runs a few of them with interpreted Triton kernels instead, as ``bench.gpu --rehearse``
does: along with ``TRITON_INTERPRET=1`` and ``KRON_KERNELS_BACKEND=triton``.
"""

from __future__ import annotations

import pytest
import torch

from gpu_support import REHEARSED
from kron_kernels import _backends


@pytest.fixture
def device() -> str:
    """Where operands go."""
    if REHEARSED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return "cuda"


@pytest.fixture
def gpu() -> str:
    """The same, for what only a real device can do."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return "cuda"


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend by name."""
    status = _backends.available()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param
