"""The one table of backends. A new backend is a file or folder that makes a ``Backend``, and one line here."""

from __future__ import annotations

from . import cpu, cuda, reference, triton
from .base import Backend, Status

# In order of preference among those of one device type, where nothing was measured.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)
}


def available() -> dict[str, Status]:
    """Every backend by name, with whether it can run here and why not."""
    return {name: backend.status() for name, backend in BACKENDS.items()}


def best(device_type: str) -> str:
    """The backend that calls on devices of a type go to where it takes them: "cpu", "triton", ... or "reference"."""
    return next(
        name
        for name, backend in BACKENDS.items()
        if backend.device() in (device_type, None) and backend.status().available
    )
