"""The ops on CUDA devices: which backend computes a call, in one place.

Compiled CUDA C++ where it was measured faster than Triton, else Triton, else what there is, at last the reference.
``choices.json`` holds what was measured: ``python -m bench.gpu`` writes it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schemas import blocks, products
from ..schemas.product import Product
from . import cuda
from .devices import allows_tf32, arch

CHOICES = Path(__file__).parent / "choices.json"
# Read once, by _backends.py too: os.environ costs as much as a small product.
DEFAULT = os.environ.get("KRON_KERNELS_BACKEND", "auto")
# In order of preference where nothing was measured.
NAMES = ("triton", "cuda")
# Numbers of tokens up to which one measurement speaks for all.
_TOKEN_CLASSES = (128, 4096)

Products = tuple[Product, ...]


class Choice(NamedTuple):
    """A backend, and the reason in words."""

    backend: str
    reason: str


# Of each op's operands the tensor whose dtype, device and rows count, and the products.
_OPERANDS: dict[str, Callable[..., tuple[Tensor, Products]]] = {
    "kron_matmul": lambda x, a, b, *_, **__: (x, (Product.of(a, b),)),
    "kron_matmul_backward": lambda _grad, x, a, b, *_: (x, (Product.of(a, b),)),
    "kron_addmm": lambda _base, x, a, b, _alpha: (x, (Product.of(a, b),)),
    "kron_addmm_": lambda _base, x, a, b, _alpha: (x, (Product.of(a, b),)),
    "kron_matmul_norm": lambda x, a, b, *_, **__: (x, (Product.of(a, b),)),
    "kron_mm_int8": lambda x, a, b: (x, (Product.of(a, b),)),
    "kron_ffn": lambda x, a1, b1, _bias1, a2, b2, *_, **__: (x, (Product.of(a1, b1), Product.of(a2, b2))),
    "kron_ffn_backward": lambda _grad, x, a1, b1, _bias1, a2, b2, *_: (x, (Product.of(a1, b1), Product.of(a2, b2))),
    "kron_qkv": lambda x, a, b, *_: (x, tuple(Product.of(*pair) for pair in zip(a, b, strict=True))),
    "kron_embedding": lambda _ids, a, b, *_: (a, (Product.of(a, b),)),
    "kron_embedding_backward": lambda _grad, _ids, a, b, *_: (a, (Product.of(a, b),)),
}
OPS = tuple(_OPERANDS)
_REFERENCES: dict[str, Callable[..., Any]] = {**products.REFERENCES, **blocks.REFERENCES}


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the cpu."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and importlib.util.find_spec("triton") is not None


@functools.cache
def status(name: str) -> tuple[bool, str]:
    """Whether a backend of ``NAMES`` can run here, and the reason in words."""
    if name == "cuda":
        return cuda.status()
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: pip install 'kron_kernels[triton]'"
    version = importlib.metadata.version("triton")
    if interpreted():
        if DEFAULT == "triton":
            return True, f"Triton {version}, interpreted on the cpu"
        return False, "TRITON_INTERPRET is set: with KRON_KERNELS_BACKEND=triton the kernels are interpreted on the cpu"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return False, "torch finds no CUDA device" if built else f"torch {torch.__version__} is built without CUDA"
    return True, f"Triton {version}"


def best() -> str:
    """The backend that calls on CUDA devices go to as far as it takes them."""
    return next((name for name in NAMES if status(name)[0]), "reference")


def refusal(
    backend: str, op: str, products: Products, dtype: torch.dtype, tokens: int = 1, arch: int | str | None = None
) -> str | None:
    """Why a backend does not take an op on operands of a dtype; None where it does.

    ``arch`` as 90 or "gfx942"; None where there is no device.
    """
    if op not in _implementations(backend):
        return f"it has no kernel of {op}"
    if backend == "cuda":
        return cuda.refusal(op, dtype, tokens, products, arch if isinstance(arch, int) else 80)
    if interpreted() and dtype is torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16"
    from .triton import describe

    return describe.refusal(op, products, dtype)


def choose(
    op: str, products: Products, dtype: torch.dtype, tokens: int, arch: int | str | None, name: str = "auto"
) -> Choice:
    """The backend of a call, and why; ``name`` is what was asked for, ``arch`` as 90 or "gfx942", None on the cpu.

    Raises RuntimeError where a backend asked for by name is not there or does not take the call.
    """
    return _choose(op, products, dtype, tokens, arch, name, allows_tf32())


# Remembered by torch's setting too, which ``refusal`` reads.
@functools.lru_cache(maxsize=4096)
def _choose(
    op: str, products: Products, dtype: torch.dtype, tokens: int, arch: int | str | None, name: str, _tf32: bool
) -> Choice:
    what = describe(op, products, dtype)
    if name in NAMES:
        available, reason = status(name)
        if not available:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
        refused = refusal(name, op, products, dtype, tokens, arch)
        if refused:
            raise RuntimeError(f"backend {name!r}, asked for by name, does not take {what}: {refused}")
        return Choice(name, "asked for by name")
    if name == "reference":
        return Choice(name, "asked for by name")
    takers, reasons = [], []
    for backend in NAMES:
        available, reason = status(backend)
        refused = reason if not available else refusal(backend, op, products, dtype, tokens, arch)
        if refused is None:
            takers.append(backend)
        else:
            reasons.append(f"{backend}: {refused}")
    if not takers:
        return Choice("reference", "; ".join(reasons))
    measured = _measured().get(f"{what} on {arch}", {}).get(str(token_class(tokens)))
    if measured is not None and measured["backend"] in takers:
        return Choice(measured["backend"], f"measured: {measured['ratio']:.2f} times as fast as {measured['over']}")
    return Choice(takers[0], "; ".join(["not measured", *reasons]))


def describe(op: str, products: Products, dtype: torch.dtype) -> str:
    """A call in words, as choices.json has it."""
    return f"{op} of {', '.join(map(str, products))} in {str(dtype).removeprefix('torch.')}"


def token_class(tokens: int) -> int | None:
    """The largest number of tokens that one measurement speaks for, along with this one; None: no limit."""
    return next((limit for limit in _TOKEN_CLASSES if tokens <= limit), None)


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, Any]]]:
    """By call and device, by token class: the faster backend, over which, how many times."""
    return json.loads(CHOICES.read_text()) if CHOICES.is_file() else {}


@functools.cache
def _implementations(backend: str) -> dict[str, Callable[..., Any]]:
    if backend == "reference":
        return _REFERENCES
    if backend == "cuda":
        return cuda.IMPLEMENTATIONS
    from .triton.ops import IMPLEMENTATIONS

    return IMPLEMENTATIONS


_local = threading.local()


def forced() -> str | None:
    """The backend that this thread's calls were asked to run on by name."""
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
    operands = _OPERANDS[op]

    def implementation(*args: Any, **kwargs: Any) -> Any:
        tensor, products = operands(*args, **kwargs)
        tokens = tensor.numel() // tensor.shape[-1] if tensor.numel() else 0  # of an embedding the rows of its table
        device_arch = arch(tensor.device.index) if tensor.is_cuda else None
        limit = token_class(tokens) or _TOKEN_CLASSES[-1] + 1
        choice = choose(op, products, tensor.dtype, limit, device_arch, forced() or DEFAULT)
        function = _implementations(choice.backend)[op]
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
    for op in _OPERANDS:
        torch.library.impl(f"kron_kernels::{op}", key, _dispatched(op))


register("CUDA")
