"""The compiled CUDA kernels: whether they run here, which problems they take, and the ops as they compute them.

Nothing is loaded before it is asked for: importing this costs nothing, with a GPU or without.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..schemas import blocks, products, reference
from .devices import allows_tf32, arch, shared_memory

_PACKAGE = Path(__file__).parent.parent
_LIBRARY = _PACKAGE / "_C_cuda.so"
# The codes of kron::DType in csrc/include/kron/problem.h.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# A product, and torch on its rows.
_AROUND_THE_PRODUCT = ("kron_matmul_norm", "kron_mm_int8")


@functools.cache
def _load() -> str:
    """Loads the ops; why that cannot be done, or ""."""
    if not _LIBRARY.is_file():
        path = _PACKAGE / "_build_info.json"
        info = json.loads(path.read_text()) if path.is_file() else {}
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
    return getattr(getattr(torch.ops, f"{products.kron_matmul.namespace}_cuda"), name).default


def device_status(device: int = 0) -> tuple[bool, str]:
    """Whether the kernels run on a device, and if not why: no driver, too old a driver, no device, its architecture."""
    reason = _load() or _op("device_status")(device)
    return not reason, reason or f"the kernels run on device {device}"


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the kernels can run on some device of this process, and the reason in words."""
    reason = _load()
    if reason:
        return False, reason
    if torch.version.cuda is None:
        return False, "this torch was built without CUDA"
    first = device_status(0)
    answers = (device_status(device) for device in range(1, torch.cuda.device_count()))
    return first if first[0] else next((answer for answer in answers if answer[0]), first)


def refusal(op: str, dtype: torch.dtype, tokens: int, products: Iterable[Sequence[int]], sm: int) -> str | None:
    """Why the kernels do not take a problem, or None where they do. Needs no GPU.

    ``products`` are the op's products as ``(terms, m1, n1, m2, n2)``, of an embedding ``(S, V, p, 1, k)``; ``sm`` is
    the compute capability, 80 for 8.0. Operands of any layout are taken.
    """
    if dtype not in _DTYPE_CODES:
        return f"the CUDA kernels have no {str(dtype).removeprefix('torch.')}"
    reason = _load()
    if reason:
        return reason
    if op in _AROUND_THE_PRODUCT:
        op = "kron_matmul"
    sizes = [size for product in products for size in product]
    code, shared = _DTYPE_CODES[dtype], shared_memory(sm)
    return _op("refusal")(op, code, tokens, sizes, sm, shared, allows_tf32()) or None


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
    products = ((*a1.shape, *b1.shape[1:]), (*a2.shape, *b2.shape[1:]))
    if _fuses_norm(x.dtype, products, _capability(x)):
        return _op("kron_ffn")(*operands, residual, norm_weight, norm_bias, eps, allows_tf32())
    y = _op("kron_ffn")(*operands, None, None, None, 0.0, allows_tf32())
    return torch.nn.functional.layer_norm(residual + y, norm_weight.shape, norm_weight, norm_bias, eps)


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
def _fuses_norm(dtype: torch.dtype, products: tuple[tuple[int, ...], ...], sm: int) -> bool:
    """Whether the block's kernel takes the norm along."""
    return refusal("kron_ffn_norm", dtype, 1, products, sm) is None


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
    return torch.nn.functional.layer_norm(residual + y, norm_weight.shape, norm_weight, norm_bias, eps)


def kron_mm_int8(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return reference.quantize_tokens(kron_matmul(x, a, b, None, 0))


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
    needed = blocks.needed(needs, len(blocks.EMBEDDING_GRADIENTS))
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
    return products._only_needed((da, db, *others), needed)


# By op, each with its op's signature. What was packed of the factors is the CPU's and passed over.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "kron_matmul": kron_matmul,
    "kron_addmm": kron_addmm,
    "kron_addmm_": kron_addmm_,
    "kron_matmul_backward": kron_matmul_backward,
    "kron_mm_int8": kron_mm_int8,
    "kron_matmul_norm": kron_matmul_norm,
    "kron_ffn": kron_ffn,
    "kron_ffn_backward": kron_ffn_backward,
    "kron_qkv": kron_qkv,
    "kron_embedding": kron_embedding,
    "kron_embedding_backward": kron_embedding_backward,
}
