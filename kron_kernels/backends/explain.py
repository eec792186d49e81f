"""What computes a call, and why: the choice of backend and the form its kernels take, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..schemas.product import Product
from . import resolve, select
from .base import Call, Device
from .devices import arch, shared_memory
from .table import BACKENDS

# The chip whose tiles are shown where there is none: an H100.
_TYPICAL = Device(90, 132, shared_memory(90))


@dataclass(frozen=True)
class Explanation:
    """``backend`` computes the call because of ``reason``; ``forms`` says by backend what it does, or why not."""

    call: str
    backend: str
    reason: str
    forms: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.backend} ({self.reason})"]
        return "\n".join([*lines, *(f"  {name}: {form}" for name, form in self.forms.items())])


def explain(
    *products: Product | tuple[int, ...],
    op: str = "kron_matmul",
    dtype: torch.dtype = torch.float32,
    tokens: int = 128,
    device: str | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend computes an op on products of given sizes, and how.

    Args:
        products: ``(S, m1, n1, m2, n2)`` of each product of the op, or ``(m1, n1, m2, n2)`` for one term.
        op: name of an op, such as "kron_matmul", "kron_matmul_backward", "kron_ffn" (two products), "kron_qkv".
        dtype: of the operands.
        tokens: rows of x.
        device: "cpu" or "cuda"; None for "cuda" where torch finds one, else "cpu".
        backend: as for ``kron_matmul``.

    Raises:
        ValueError: an op, number of products or sizes that do not fit.
        RuntimeError: a backend requested by name that cannot run here or does not take the call.
    """
    sizes = _checked(op, products)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    requested = backend not in (None, "auto")
    name = resolve(backend, device)
    reason = select.REQUESTED if requested else BACKENDS[name].status().reason
    chip, here = _TYPICAL, None
    if device == "cuda" and torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties()
        here = arch(torch.cuda.current_device())
        chip = Device(here, properties.multi_processor_count, properties.shared_memory_per_block_optin)
    if device == "cuda" or name in select.NAMES:
        name, reason = select.choose(op, sizes, dtype, tokens, here, name if requested else "auto")
    call = Call(op, sizes, dtype, tokens, here)
    forms = {row.name: row.form(call, chip) for row in BACKENDS.values() if row.name != "reference"}
    where = f"{tokens} tokens in {str(dtype).removeprefix('torch.')} on {device}"
    return Explanation(f"{op} of {', '.join(map(str, sizes))}, {where}", name, reason, forms)


def _checked(op: str, products: tuple[Product | tuple[int, ...], ...]) -> tuple[Product, ...]:
    if op not in select.OPS:
        raise ValueError(f"op: expected one of {', '.join(map(repr, select.OPS))}, got {op!r}")
    wanted = 2 if op.startswith("kron_ffn") else None if op == "kron_qkv" else 1
    if len(products) != wanted and (wanted is not None or not products):
        raise ValueError(f"products: expected {wanted or 'one or more'} for {op}, got {len(products)}")
    found = []
    for sizes in products:
        if len(sizes) not in (4, 5) or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"products: expected (S, m1, n1, m2, n2) or (m1, n1, m2, n2), all positive, got {sizes}")
        found.append(Product(*sizes) if len(sizes) == 5 else Product(1, *sizes))
    return tuple(found)
