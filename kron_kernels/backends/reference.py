"""The reference as a backend: plain torch on any device. Importing it defines the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..schemas import registry
from .base import Backend, Call, Device, Status

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = registry.REFERENCES
_STATUS = Status("reference", True, "plain torch, always there")


def unsupported_reason(call: Call) -> str | None:
    """None: it takes every call of every op."""
    return None if call.op in IMPLEMENTATIONS else f"there is no op {call.op}"


def form(_call: Call, _device: Device) -> str:
    """How it runs a call."""
    return "torch's own operations, one after another"


BACKEND = Backend("reference", lambda: _STATUS, lambda: None, unsupported_reason, form, lambda: IMPLEMENTATIONS)
