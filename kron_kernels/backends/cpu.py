"""The compiled CPU kernels: whether they run here, and at which instruction-set level.

Their library registers the ops under torch's CPU key itself, so there are no Python implementations.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from ..schemas import torch_internals
from ..schemas.reference import order_cost
from . import triton
from .base import DEFAULT, PACKAGE, Backend, Call, Device, Status, build_info, one_of

ISA_LEVELS = ("portable", "neon", "avx2", "avx512", "amx")


@functools.cache
def status() -> Status:
    """Load the compiled extension and say whether it is there.

    Raises ValueError for an unknown instruction-set level in ``KRON_KERNELS_CPU_ISA``.
    """
    cap = os.environ.get("KRON_KERNELS_CPU_ISA") or "amx"  # read by the core itself, which cannot complain
    if cap not in ISA_LEVELS:
        raise ValueError(f"environment variable KRON_KERNELS_CPU_ISA: {one_of(ISA_LEVELS)}, got {cap!r}")
    if DEFAULT == "triton" and triton.interpreted():
        return Status("cpu", False, "not loaded: Triton's interpreter computes on the cpu")
    library = PACKAGE / "_C.so"
    if not library.is_file():
        reason = build_info().get("missing", "the package was not built")
        return Status("cpu", False, f"the compiled extension is absent: {reason}")
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return Status("cpu", False, f"the compiled extension does not load: {error}")
    return Status("cpu", True, "compiled extension loaded")


@functools.cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether an op has an implementation of its own for devices of a type, and not the reference alone."""
    if device_type not in ("cpu", "cuda"):
        return False
    return torch_internals.has_kernel(op, device_type)


def unsupported_reason(call: Call) -> str | None:
    """Why the kernels do not take a call; None where they do."""
    return None if has_kernel(call.op, "cpu") else f"it has no kernel of {call.op}"


def form(call: Call, _device: Device) -> str:
    """In which order each product goes through its factors, and what that costs."""
    orders = []
    for _, m1, n1, m2, n2 in call.products:
        right, left = order_cost(m1, n1, m2, n2)
        order = "left" if left <= right else "right"
        best, other = sorted((left, right))
        orders.append(f"the {order} factor first, {best:,} multiply-adds a token and term (else {other:,})")
    return "; then ".join(orders)


def introspect() -> Any:
    """The module that tells about the core. Raises RuntimeError where it or the extension does not load."""
    if not status().available:
        raise RuntimeError(f"backend 'cpu' is not available: {status().reason}")
    try:
        return importlib.import_module("kron_kernels._introspect")
    except ImportError as error:
        built = build_info().get("introspection", "not built")
        raise RuntimeError(f"the introspection module does not load: {error} (build: {built})") from error


def active_isa() -> str:
    """The instruction-set level the CPU kernels run at: one of "portable", "neon", "avx2", "avx512", "amx"."""
    return introspect().active_isa()


def set_isa(cap: str) -> str:
    """Cap the CPU kernels' instruction-set level for this process and return the level then in use.

    That is the highest level not above ``cap`` that this processor has and this build holds ("portable" for a level of
    another processor family: "neon" is of 64-bit ARM, the later ones of x86-64).
    The environment variable ``KRON_KERNELS_CPU_ISA`` does the same at start.
    """
    if cap not in ISA_LEVELS:
        raise ValueError(f"cap: {one_of(ISA_LEVELS)}, got {cap!r}")
    introspect().set_isa_cap(cap)
    return active_isa()


BACKEND = Backend("cpu", status, lambda: "cpu", unsupported_reason, form, dict)
