"""The ops that have Triton kernels, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import embedding, embedding_backward, ffn, ffn_backward, mm, projections, rows

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "kron_embedding": embedding.kron_embedding,
    "kron_embedding_backward": embedding_backward.kron_embedding_backward,
    "kron_ffn": ffn.kron_ffn,
    "kron_ffn_backward": ffn_backward.kron_ffn_backward,
    "kron_mm": mm.kron_mm,
    "kron_mm_add": mm.kron_mm_add,
    "kron_mm_add_": mm.kron_mm_add_,
    "kron_mm_backward": mm.kron_mm_backward,
    "kron_mm_int8": rows.kron_mm_int8,
    "kron_mm_norm": rows.kron_mm_norm,
    "kron_qkv": projections.kron_qkv,
}
