"""The ops that have Triton kernels, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import (
    embedding,
    embedding_backward,
    ffn,
    ffn_backward,
    mm,
    projections,
    rows,
)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "kron_embedding": embedding.kron_embedding,
    "kron_embedding_backward": embedding_backward.kron_embedding_backward,
    "kron_ffn": ffn.kron_ffn,
    "kron_ffn_backward": ffn_backward.kron_ffn_backward,
    "kron_matmul": mm.kron_matmul,
    "kron_addmm": mm.kron_addmm,
    "kron_addmm_": mm.kron_addmm_,
    "kron_matmul_backward": mm.kron_matmul_backward,
    "kron_matmul_norm": rows.kron_matmul_norm,
    "kron_qkv": projections.kron_qkv,
}
