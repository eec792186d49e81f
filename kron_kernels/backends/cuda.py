"""The compiled CUDA kernels: whether they run here, which problems they take, and the ops as they compute them.

Nothing is loaded before it is asked for: importing this costs nothing, with a GPU or without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..schemas import embedding, matmul, reference, registry
from ..schemas.product import Product
from .base import PACKAGE, Backend, Call, Device, Products, Status, build_info
from .devices import allows_tf32, arch, shared_memory

_LIBRARY = PACKAGE / "_C_cuda.so"
# The codes of kron::DType in csrc/include/kron/problem.h.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def _load() -> str:
    """Loads the ops; why that cannot be done, or ""."""
    if not _LIBRARY.is_file():
        info = build_info()
        return "the CUDA kernels are absent: " + (
            info.get("missing") or info.get("cuda") or "the package was not built"
        )
    try:
        torch.ops.load_library(_LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"the CUDA kernels do not load: {error}"
    return ""


@functools.cache
def _op(name: str) -> Any:
    """An op of the kernels: their namespace is that of the package's own ops with ``_cuda`` behind it."""
    reason = _load()
    if reason:
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    return getattr(getattr(torch.ops, f"{matmul.kron_matmul.namespace}_cuda"), name).default


def device_status(device: int = 0) -> tuple[bool, str]:
    """Whether the kernels run on a device, and if not why: no driver, too old a driver, no device, its architecture."""
    reason = _load() or _op("device_status")(device)
    return not reason, reason or f"the kernels run on device {device}"


@functools.cache
def status() -> Status:
    """Whether the kernels can run on some device of this process, and the reason in words."""
    reason = _load()
    if reason:
        return Status("cuda", False, reason)
    if torch.version.cuda is None:
        return Status("cuda", False, "this torch was built without CUDA")
    first = device_status(0)
    others = (device_status(device) for device in range(1, torch.cuda.device_count()))
    return Status("cuda", *(first if first[0] else next((other for other in others if other[0]), first)))


def unsupported_reason(call: Call) -> str | None:
    """Why the kernels do not take a call, or None where they do. Needs no GPU; without one that of an sm_80.

    An embedding is a product ``(S, V, p, 1, k)``. Operands of any layout are taken.
    """
    op, products, dtype, tokens, sm = call
    if op not in IMPLEMENTATIONS:
        return f"it has no kernel of {op}"
    if op == "kron_matmul_norm":  # a product, and torch on its rows
        op = "kron_matmul"
    return _kernel_reason(op, products, dtype, tokens, sm if isinstance(sm, int) else 80)


def _kernel_reason(op: str, products: Products, dtype: torch.dtype, tokens: int, sm: int) -> str | None:
    """The same of a kernel, which need not be an op: "kron_ffn_norm" is the feed-forward block with its norm."""
    if dtype not in _DTYPE_CODES:
        return f"the CUDA kernels have no {str(dtype).removeprefix('torch.')}"
    reason = _load()
    if reason:
        return reason
    sizes = [size for product in products for size in product]
    call = (op, _DTYPE_CODES[dtype], tokens, sizes, sm, shared_memory(sm), allows_tf32())
    return _op("unsupported_reason")(*call) or None


def form(call: Call, device: Device) -> str:
    """Whether the kernels take a call on a device, or why not."""
    return unsupported_reason(call._replace(arch=device.arch)) or "takes it"


def kron_matmul(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: int, packed: Tensor | None = None
) -> Tensor:
    return _op("kron_matmul")(x, a, b, bias, activation, allows_tf32())


def kron_addmm(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return _op("kron_addmm")(base, x, a, b, alpha, allows_tf32())


def kron_addmm_(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    _op("kron_addmm_")(base, x, a, b, alpha, allows_tf32())


def kron_matmul_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _op("kron_matmul_backward")(grad, x, a, b, needs, allows_tf32())


def kron_ffn(
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    bias2: Tensor | None,
    activation: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    packed1: Tensor | None = None,
    packed2: Tensor | None = None,
) -> Tensor:
    operands = (x, a1, b1, bias1, a2, b2, bias2, activation)
    if residual is None or norm_weight is None:
        return _op("kron_ffn")(*operands, None, None, None, 0.0, allows_tf32())
    if _fuses_norm((Product.of(a1, b1), Product.of(a2, b2)), x.dtype, _capability(x)):
        return _op("kron_ffn")(*operands, residual, norm_weight, norm_bias, eps, allows_tf32())
    y = _op("kron_ffn")(*operands, None, None, None, 0.0, allows_tf32())
    return reference.add_norm(y, residual, norm_weight, norm_bias, eps)


def kron_ffn_backward(
    grad: Tensor,
    x: Tensor,
    a1: Tensor,
    b1: Tensor,
    bias1: Tensor | None,
    a2: Tensor,
    b2: Tensor,
    activation: int,
    needs: int,
) -> tuple[Tensor, ...]:
    return _op("kron_ffn_backward")(grad, x, a1, b1, bias1, a2, b2, activation, needs, allows_tf32())


@functools.lru_cache(maxsize=1024)
def _fuses_norm(products: Products, dtype: torch.dtype, sm: int) -> bool:
    """Whether the block's kernel takes the norm along."""
    return _kernel_reason("kron_ffn_norm", products, dtype, 1, sm) is None


def _capability(x: Tensor) -> int:
    return int(arch(x.device.index)) if x.is_cuda else 80  # the emulator's


def kron_matmul_norm(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    packed: Tensor | None = None,
) -> Tensor:
    y = kron_matmul(x, a, b, bias, 0)
    return reference.add_norm(y, residual, norm_weight, norm_bias, eps)


def kron_qkv(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], bias: Sequence[Tensor], packed: Sequence[Tensor]
) -> list[Tensor]:
    return _op("kron_qkv")(x, a, b, bias, allows_tf32())


def kron_embedding(ids: Tensor, a: Tensor, b: Tensor, *operands: Any) -> Tensor:
    return _op("kron_embedding")(ids, a, b, *operands)


def kron_embedding_backward(
    grad: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    type_ids: Tensor | None,
    type_weight: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    needs: int,
) -> tuple[Tensor, ...]:
    needed = registry.needed(needs, len(embedding.EMBEDDING_GRADIENTS))
    tables = (position_ids, position_weight, type_ids, type_weight)
    rows = None if norm_weight is None else kron_embedding(ids, a, b, *tables, None, None, eps)
    wanted = (*(tables[:2] if needed[2] else (None, None)), *(tables[2:] if needed[3] else (None, None)))
    grad, *others = reference.added_rows_backward(grad, rows, *wanted, norm_weight, eps)
    da = db = a.new_empty(0)
    if needed[0] or needed[1]:
        # (T, S * p): what each token adds to its row of a
        parts, db = _op("kron_embedding_backward")(grad, ids, a, b)
        if needed[0]:
            da = reference.sum_into_rows(parts, ids.reshape(-1), a.shape[1])
            da = da.view(a.shape[1], a.shape[0], a.shape[2]).transpose(0, 1).contiguous()
    return registry.only_needed((da, db, *others), needed)


# By op, each with its op's signature. There are no packed factors here: select.py raises.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "kron_matmul": kron_matmul,
    "kron_addmm": kron_addmm,
    "kron_addmm_": kron_addmm_,
    "kron_matmul_backward": kron_matmul_backward,
    "kron_matmul_norm": kron_matmul_norm,
    "kron_ffn": kron_ffn,
    "kron_ffn_backward": kron_ffn_backward,
    "kron_qkv": kron_qkv,
    "kron_embedding": kron_embedding,
    "kron_embedding_backward": kron_embedding_backward,
}

BACKEND = Backend("cuda", status, lambda: "cuda", unsupported_reason, form, lambda: IMPLEMENTATIONS)
