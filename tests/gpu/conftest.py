"""Tests on a GPU, ``pytest -m gpu tests/gpu``: every result starts as NaN, and each backend is requested by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kron_kernels import backends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that torch hands out holds NaN: a value that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each GPU backend by name."""
    status = backends.available()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param
