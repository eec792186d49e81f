"""What the GPU tests share: where and on what they run, operands moved as they lie, refusals that are in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kron_kernels.backends import select
from kron_kernels.backends.devices import arch
from kron_kernels.schemas.product import Product

T = TypeVar("T")
# With interpreted kernels on the CPU in place of a GPU: tests/gpu/conftest.py.
REHEARSED = not torch.cuda.is_available() and os.environ.get("KRON_KERNELS_GPU_TESTS") == "cpu"
# The interpreter is wrong in bfloat16.
DTYPES = (torch.float32, torch.float16) if REHEARSED else (torch.float32, torch.float16, torch.bfloat16)


def with_dtypes(table: Sequence[T]) -> list[tuple[T, torch.dtype]]:
    """Each case in each dtype; in float16, whose kernels are those of bfloat16, every third: compiling takes time."""
    return [
        (case, dtype)
        for index, case in enumerate(table)
        for dtype in DTYPES
        if dtype is not torch.float16 or REHEARSED or index % 3 == 0
    ]


def name_of(value: object) -> str:
    """Of a case or dtype, in a test's id."""
    return str(getattr(value, "id", value))


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor on a device with its strides and its place in the storage, which ``to`` would change."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.clone().to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextlib.contextmanager
def refused(backend: str, op: str, factors: tuple[Tensor, ...], dtype: torch.dtype, tokens: int) -> Iterator[None]:
    """Inside, a call; where the backend says that it does not take it, it has to raise, and the test is skipped."""
    products = tuple(Product.of(a, b) for a, b in zip(factors[::2], factors[1::2], strict=True))
    chip = arch(0) if torch.cuda.is_available() else None
    ops = (op.removesuffix("_backward"), op) if op.endswith("_backward") else (op,)
    reasons = [select.unsupported_reason(backend, each, products, dtype, tokens, chip) for each in ops]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        yield
        return
    with pytest.raises(RuntimeError, match=f"backend '{backend}', requested by name, does not take"):
        yield
    pytest.skip(f"{backend}: {reason}")
