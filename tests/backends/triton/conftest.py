"""The Triton kernels under Triton's interpreter, which needs no GPU: on CPU tensors, in float32 and float16."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kron_kernels.backends.triton.launch import INTERPRETED

if not INTERPRETED:
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One test of each op is a smoke test; the rest are slow, which pure functions of sizes are not."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and not item.get_closest_marker("quick"):
            item.add_marker(pytest.mark.slow)
