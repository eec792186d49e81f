"""Which backend computes a call, and why: one table (``table.py``), one switch (``KRON_KERNELS_BACKEND``).

Automatic choice falls back to the reference. A backend requested by name that is not available is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch

from . import select  # defines the ops, which must exist before a library adds kernels to them
from .base import DEFAULT as _DEFAULT
from .base import Status, build_info, one_of
from .cpu import ISA_LEVELS as CPU_ISA_LEVELS
from .cpu import active_isa as cpu_isa
from .cpu import has_kernel, introspect
from .cpu import set_isa as set_cpu_isa
from .cpu import status as _cpu_status
from .table import BACKENDS, available, best

__all__ = [
    "BACKENDS",
    "CPU_BY_DEFAULT",
    "CPU_ISA_LEVELS",
    "Status",
    "available",
    "build_info",
    "compiled_by_default",
    "cpu_isa",
    "forced",
    "has_kernel",
    "introspect",
    "is_unforced",
    "keep_ops",
    "resolve",
    "set_cpu_isa",
]

# A call that names no backend runs the compiled kernels when its tensors are on the cpu.
CPU_BY_DEFAULT = _cpu_status().available and _DEFAULT in ("auto", "cpu")
if _DEFAULT == "triton" and BACKENDS["triton"].device() == "cpu":
    select.register("CPU")


def compiled_by_default(op: str) -> bool:
    """Whether calls of an op that name no backend find a compiled kernel when their tensors are on the cpu."""
    return CPU_BY_DEFAULT and has_kernel(op, "cpu")


_keep_ops = False


@contextmanager
def keep_ops() -> Iterator[None]:
    """Inside, calls that name no backend become calls of the ops, whatever computes them: for graphs to be saved."""
    global _keep_ops
    before, _keep_ops = _keep_ops, True
    try:
        yield
    finally:
        _keep_ops = before


@torch.compiler.assume_constant_result  # what it asks of files and devices, no compiler traces
def resolve(backend: str | None, device_type: str) -> str:
    """Name of the backend that computes on devices of a type, "cpu" or another of torch's.

    ``backend`` is None (take ``KRON_KERNELS_BACKEND``, else "auto"), "auto", or a name of ``available()``. Raises
    ValueError for an unknown name and RuntimeError when the named backend is missing or does not serve such devices.
    """
    if backend is None and _keep_ops:
        return "cpu"
    name = _DEFAULT if backend is None else backend
    if name == "auto":
        return best(device_type)
    if name not in BACKENDS:
        origin = "environment variable KRON_KERNELS_BACKEND" if backend is None else "backend"
        raise ValueError(f"{origin}: {one_of(('auto', *BACKENDS))}, got {name!r}")
    status = BACKENDS[name].status()
    if not status.available:
        raise RuntimeError(f"backend {name!r} is not available: {status.reason}")
    serves = BACKENDS[name].device()
    if serves not in (device_type, None):
        raise RuntimeError(f"backend {name!r} computes tensors on the {serves}, got a tensor on {device_type}")
    return name


def is_unforced(backend: str | None) -> TypeGuard[str]:
    """Whether a GPU backend was requested by name and does not hold yet: the call is then made again by ``forced``."""
    return backend is not None and backend in select.NAMES and select.forced() != backend


def forced(function: Callable[..., Any], *args: Any, backend: str, **kwargs: Any) -> Any:
    """Call with a GPU backend requested by name, which then computes all ops of the call and of its backward."""
    with select.force(backend):
        return function(*args, backend=backend, **kwargs)
