"""Which backend computes a call of an op on a CUDA device, and why.

The one measured to be faster, else the first of the table that takes the call, at last the reference.
``choices.json`` holds what was measured: ``python -m bench.run gpu`` writes it.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schemas.pack import reject_packed
from ..schemas.product import Product
from .base import DEFAULT, Call, Products
from .devices import allows_tf32, arch
from .table import BACKENDS

CHOICES = Path(__file__).parent / "choices.json"
# The backends that are chosen among for each call: those of GPUs.
NAMES = tuple(name for name in BACKENDS if name not in ("cpu", "reference"))
# Numbers of tokens up to which one measurement speaks for all.
_TOKEN_CLASSES = (128, 4096)
# Numbers of tokens are rounded up to a power of two for the choice, so that few choices are remembered; beyond this,
# where kernels have limits, they are asked about as they are.
_MOST_ROUNDED = 2**24
REQUESTED = "requested by name"


class Choice(NamedTuple):
    """A backend, and the reason in words."""

    backend: str
    reason: str


# Of each op's operands the tensor whose dtype and device count, the products and the number of tokens.
Operands = tuple[Tensor, Products, int]


def _product(x: Tensor, a: Tensor, b: Tensor) -> Operands:
    return x, (Product.of(a, b),), _tokens(x)


def _block(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Operands:
    return x, (Product.of(a1, b1), Product.of(a2, b2)), _tokens(x)


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.numel() else 0


_OPERANDS: dict[str, Callable[..., Operands]] = {
    "kron_matmul": lambda x, a, b, *_, **__: _product(x, a, b),
    "kron_matmul_backward": lambda _grad, x, a, b, *_: _product(x, a, b),
    "kron_addmm": lambda _base, x, a, b, _alpha: _product(x, a, b),
    "kron_addmm_": lambda _base, x, a, b, _alpha: _product(x, a, b),
    "kron_matmul_norm": lambda x, a, b, *_, **__: _product(x, a, b),
    "kron_ffn": lambda x, a1, b1, _bias1, a2, b2, *_, **__: _block(x, a1, b1, a2, b2),
    "kron_ffn_backward": lambda _grad, x, a1, b1, _bias1, a2, b2, *_: _block(x, a1, b1, a2, b2),
    "kron_qkv": lambda x, a, b, *_: (x, tuple(Product.of(*pair) for pair in zip(a, b, strict=True)), _tokens(x)),
    "kron_embedding": lambda ids, a, b, *_: (a, (Product.of(a, b),), ids.numel()),
    "kron_embedding_backward": lambda _grad, ids, a, b, *_: (a, (Product.of(a, b),), ids.numel()),
}
OPS = tuple(_OPERANDS)
# Where an op's operands hold packed factors, which are the CPU kernels' alone.
_PACKED = {"kron_matmul": slice(5, 6), "kron_matmul_norm": slice(8, 9), "kron_ffn": slice(12, 14)}


def unsupported_reason(
    backend: str, op: str, products: Products, dtype: torch.dtype, tokens: int = 1, arch: int | str | None = None
) -> str | None:
    """Why a backend does not take an op on operands of a dtype; None where it does.

    ``arch`` as 90 or "gfx942"; None where there is no device.
    """
    return BACKENDS[backend].unsupported_reason(Call(op, products, dtype, tokens, arch))


def choose(
    op: str, products: Products, dtype: torch.dtype, tokens: int, arch: int | str | None, name: str = "auto"
) -> Choice:
    """The backend of a call, and why; ``name`` is what was requested, ``arch`` as 90 or "gfx942", None on the cpu.

    Raises RuntimeError where a backend requested by name is not available or does not take the call.
    """
    if tokens <= _MOST_ROUNDED:
        tokens = 1 << max(tokens - 1, 0).bit_length()
    return _choose(Call(op, products, dtype, tokens, arch), name, allows_tf32())


# Remembered by torch's setting too, on which the reasons depend.
@functools.lru_cache(maxsize=4096)
def _choose(call: Call, name: str, _tf32: bool) -> Choice:
    if name in NAMES:
        status = BACKENDS[name].status()
        if not status.available:
            raise RuntimeError(f"backend {name!r} is not available: {status.reason}")
        reason = BACKENDS[name].unsupported_reason(call)
        if reason:
            raise RuntimeError(f"backend {name!r}, {REQUESTED}, does not take {call}: {reason}")
        return Choice(name, REQUESTED)
    if name == "reference":
        return Choice(name, REQUESTED)
    candidates, reasons = [], []
    for backend in NAMES:
        status = BACKENDS[backend].status()
        reason = BACKENDS[backend].unsupported_reason(call) if status.available else status.reason
        if reason is None:
            candidates.append(backend)
        else:
            reasons.append(f"{backend}: {reason}")
    if not candidates:
        return Choice("reference", "; ".join(reasons))
    measured = _measured().get(f"{call} on {call.arch}", {}).get(str(token_class(call.tokens)))
    if measured is not None and measured["backend"] in candidates:
        return Choice(measured["backend"], f"measured: {measured['ratio']:.2f} times as fast as {measured['over']}")
    return Choice(candidates[0], "; ".join(["not measured", *reasons]))


def token_class(tokens: int) -> int | None:
    """The largest number of tokens that one measurement speaks for, along with this one; None: no limit."""
    return next((limit for limit in _TOKEN_CLASSES if tokens <= limit), None)


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, Any]]]:
    """By call and device, by token class: the faster backend, over which, how many times."""
    return json.loads(CHOICES.read_text()) if CHOICES.is_file() else {}


_local = threading.local()


def forced() -> str | None:
    """The backend that this thread's calls were requested to run on by name."""
    return getattr(_local, "name", None)


_UNCHANGED = nullcontext()


def force(name: str | None) -> AbstractContextManager[None]:
    """Inside, this thread's calls on CUDA devices run on a backend of ``NAMES``; None changes nothing."""
    return _UNCHANGED if name is None else _force(name)


@contextmanager
def _force(name: str) -> Iterator[None]:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"backend: expected None or 'auto' under torch.compile, got {name!r}: set KRON_KERNELS_BACKEND instead"
        )
    before, _local.name = forced(), name
    try:
        yield
    finally:
        _local.name = before


def _dispatched(op: str) -> Callable[..., Any]:
    operands, packed = _OPERANDS[op], _PACKED.get(op, slice(0))

    def implementation(*args: Any, **kwargs: Any) -> Any:
        reject_packed(*(args[4] if op == "kron_qkv" else args[packed]))
        tensor, products, tokens = operands(*args, **kwargs)
        device_arch = arch(tensor.device.index) if tensor.is_cuda else None
        choice = choose(op, products, tensor.dtype, tokens, device_arch, forced() or DEFAULT)
        function = BACKENDS[choice.backend].implementations()[op]
        autocasts = torch.is_autocast_enabled(tensor.device.type)
        elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
        if not autocasts and not elsewhere:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            if autocasts:  # the op's dtype is its inputs', inside autocast too
                stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
            if elsewhere:
                stack.enter_context(torch.cuda.device(tensor.device))
            return function(*args, **kwargs)

    return implementation


def register(key: str) -> None:
    """Add the ops' implementations to a key of the dispatcher."""
    for op in OPS:
        torch.library.impl(f"kron_kernels::{op}", key, _dispatched(op))


register("CUDA")
