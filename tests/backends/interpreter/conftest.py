"""The Triton kernels under Triton's interpreter, which needs no GPU: on CPU tensors, in float32 and float16."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kron_kernels.backends.triton.launch import INTERPRETED

if not INTERPRETED:
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)
