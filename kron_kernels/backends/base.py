"""What a backend tells about itself: the row that each of them contributes to the table in ``table.py``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..schemas.product import Product

PACKAGE = Path(__file__).parent.parent
# The backend of calls that name none. Read once: os.environ costs as much as a small product.
DEFAULT = os.environ.get("KRON_KERNELS_BACKEND", "auto")

Products = tuple[Product, ...]


@dataclass(frozen=True)
class Status:
    """Whether a backend can run on this machine, and the reason in words."""

    name: str
    available: bool
    reason: str


class Device(NamedTuple):
    """What tiles depend on: arch 80, 90, ... of CUDA or a name such as "gfx942"; bytes of shared memory a program."""

    arch: int | str
    multiprocessors: int
    shared: int


class Call(NamedTuple):
    """A call of an op as far as the choice of a backend needs it; of an embedding, tokens are its ids.

    ``arch`` is 90 or "gfx942"; None where there is no device.
    """

    op: str
    products: Products
    dtype: torch.dtype
    tokens: int
    arch: int | str | None = None

    def __str__(self) -> str:
        return f"{self.op} of {', '.join(map(str, self.products))} in {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    ``device`` gives the device type it computes on, None for any. ``unsupported_reason`` says why it does not take a
    call, None where it does. ``form`` says how its kernels run a call on a device. ``implementations`` gives a function
    for each op; {} where a library registers them with torch itself. None of these may import what is optional before
    it is called.
    """

    name: str
    status: Callable[[], Status]
    device: Callable[[], str | None]
    unsupported_reason: Callable[[Call], str | None]
    form: Callable[[Call, Device], str]
    implementations: Callable[[], Mapping[str, Callable[..., Any]]]


def build_info() -> dict[str, Any]:
    """What the build wrote about itself: compiler, flags, ISA levels, torch, what is missing and why; {} if unbuilt."""
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def one_of(choices: tuple[str, ...]) -> str:
    """The start of an error message about a word that is none of the choices."""
    return f"expected one of {', '.join(map(repr, choices))}"
