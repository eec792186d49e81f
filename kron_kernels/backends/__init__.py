"""Which backend computes a call, and why: one place, one switch (``KRON_KERNELS_BACKEND``).

Automatic choice falls back to the reference; a backend asked for by name that is not there is an error.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from . import select  # with it the schemas, which must stand before a library adds kernels to them

_PACKAGE = Path(__file__).parent.parent
CPU_ISA_LEVELS = ("portable", "neon", "avx2", "avx512", "amx")


@dataclass(frozen=True)
class Status:
    """Whether a backend can run on this machine, and the reason in words."""

    name: str
    available: bool
    reason: str


def build_info() -> dict[str, Any]:
    """What the build wrote about itself: compiler, flags, ISA levels, torch, what is missing and why; {} if unbuilt."""
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _one_of(choices: tuple[str, ...]) -> str:
    return f"expected one of {', '.join(map(repr, choices))}"


def _load_extension() -> Status:
    cap = os.environ.get("KRON_KERNELS_CPU_ISA", "amx")  # read by the core itself, which cannot complain
    if cap not in CPU_ISA_LEVELS:
        raise ValueError(f"environment variable KRON_KERNELS_CPU_ISA: {_one_of(CPU_ISA_LEVELS)}, got {cap!r}")
    if select.DEFAULT == "triton" and select.interpreted():
        select.register("CPU")
        return Status("cpu", False, "not loaded: Triton's interpreter computes on the cpu")
    library = _PACKAGE / "_C.so"
    if not library.is_file():
        reason = build_info().get("missing", "the package was not built")
        return Status("cpu", False, f"the compiled extension is absent: {reason}")
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return Status("cpu", False, f"the compiled extension does not load: {error}")
    return Status("cpu", True, "compiled extension loaded")


_REFERENCE = Status("reference", True, "plain torch, always there")
_STATUS = {status.name: status for status in (_load_extension(), _REFERENCE)}
_CPU_READY = _STATUS["cpu"].available
_DEFAULT = select.DEFAULT
# A call that names no backend runs the compiled kernels when its tensors are on the cpu.
CPU_BY_DEFAULT = _CPU_READY and _DEFAULT in ("auto", "cpu")


def compiled_by_default(op: str) -> bool:
    """Whether calls of an op that name no backend find a compiled kernel when their tensors are on the cpu."""
    return CPU_BY_DEFAULT and has_kernel(op, "cpu")


@functools.cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether an op has an implementation of its own for devices of a type, and not the reference alone."""
    if device_type not in ("cpu", "cuda"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kron_kernels::{op}", device_type.upper())


def available() -> dict[str, Status]:
    """Every backend by name, with whether it can run here and why not."""
    gpu = {name: Status(name, *select.status(name)) for name in select.NAMES}
    return {"cpu": _STATUS["cpu"], **gpu, "reference": _STATUS["reference"]}


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


def resolve(backend: str | None, device_type: str) -> str:
    """Name of the backend that computes on devices of a type, "cpu" or another of torch's.

    ``backend`` is None (take ``KRON_KERNELS_BACKEND``, else "auto"), "auto", or a name of ``available()``. Raises
    ValueError for an unknown name and RuntimeError when the named backend is missing or does not serve such devices.
    """
    if backend is None and _keep_ops:
        return "cpu"
    name = _DEFAULT if backend is None else backend
    if name == "auto":
        return select.best() if device_type == "cuda" else "cpu" if _CPU_READY and device_type == "cpu" else "reference"
    status = Status(name, *select.status(name)) if name in select.NAMES else _STATUS.get(name)
    if status is None:
        origin = "environment variable KRON_KERNELS_BACKEND" if backend is None else "backend"
        raise ValueError(f"{origin}: {_one_of(('auto', *available()))}, got {name!r}")
    if not status.available:
        raise RuntimeError(f"backend {name!r} is not available: {status.reason}")
    serves = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if select.interpreted() else "cuda"}.get(name, device_type)
    if device_type != serves:
        raise RuntimeError(f"backend {name!r} computes tensors on the {serves}, got a tensor on {device_type}")
    return name


def is_unforced(backend: str | None) -> TypeGuard[str]:
    """Whether a GPU backend was asked for by name and does not hold yet: the call is then made again by ``forced``."""
    return backend is not None and backend in select.NAMES and select.forced() != backend


def forced(function: Callable[..., Any], *args: Any, backend: str, **kwargs: Any) -> Any:
    """Call with a GPU backend asked for by name, which then computes all ops of the call and of its backward."""
    with select.force(backend):
        return function(*args, backend=backend, **kwargs)


def _introspect() -> Any:
    if not _CPU_READY:
        raise RuntimeError(f"backend 'cpu' is not available: {_STATUS['cpu'].reason}")
    try:
        from .. import _introspect
    except ImportError as error:
        built = build_info().get("introspection", "not built")
        raise RuntimeError(f"the introspection module does not load: {error} (build: {built})") from error
    return _introspect


def cpu_isa() -> str:
    """The instruction-set level the CPU kernels run at: one of "portable", "neon", "avx2", "avx512", "amx"."""
    return _introspect().active_isa()


def set_cpu_isa(cap: str) -> str:
    """Cap the CPU kernels' instruction-set level for this process and return the level then in use.

    That is the highest level not above ``cap`` that this processor has and this build holds ("portable" for a level of
    another processor family: "neon" is of 64-bit ARM, the later ones of x86-64).
    The environment variable ``KRON_KERNELS_CPU_ISA`` does the same at start.
    """
    if cap not in CPU_ISA_LEVELS:
        raise ValueError(f"cap: {_one_of(CPU_ISA_LEVELS)}, got {cap!r}")
    introspect = _introspect()
    introspect.set_isa_cap(cap)
    return introspect.active_isa()
