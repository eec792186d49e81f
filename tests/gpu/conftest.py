"""Tests on a GPU: skipped where there is none.

``KRON_KERNELS_GPU_TESTS=cpu`` runs a few of them with interpreted Triton kernels instead, as ``bench.gpu --rehearse``
does: along with ``TRITON_INTERPRET=1`` and ``KRON_KERNELS_BACKEND=triton``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kron_kernels import backends
from tests.gpu.gpu_support import REHEARSED

# "2/8": the third of eight parts of the tests, which processes share among them.
_SHARD = os.environ.get("KRON_KERNELS_GPU_TESTS_SHARD", "0/1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    part, parts = map(int, _SHARD.split("/"))
    own = [item for item in items if item.path.is_relative_to(here)]
    # What takes much of the device's memory stays in one process.
    left = {item for index, item in enumerate(own) if (0 if "more_elements" in item.name else index % parts) != part}
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


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
    status = backends.available()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param
