"""Modules with factored weights: drop-in for nn.Linear and nn.Embedding, and the decoder tied to the latter.

A Kronecker weight is ``W = sum_s A_s (x) B_s`` with ``a (S, m1, n1)`` and ``b (S, m2, n2)``; it is never built in
``forward``. The state dict of every module holds ``a``, ``b`` and, where there is one, ``bias``. ``LowRankLinear`` and
``AdaptiveEmbedding`` are the low-rank structures. See ``quantized`` for large factors kept as int8 or int4.
"""

from .adaptive import AdaptiveEmbedding, fit_adaptive
from .decoder import TiedDecoder
from .embedding import KronDecoder, KronEmbedding, fit_embedding
from .factored import Shape, Shapes
from .inference import PackedKronLinear
from .linear import KronLinear, fit_linear
from .low_rank import LowRankLinear, fit_low_rank
from .quantized import (
    QuantizedAdaptiveEmbedding,
    QuantizedKronEmbedding,
    QuantizedKronLinear,
    QuantizedLowRankLinear,
    is_quantized,
)

__all__ = [
    "AdaptiveEmbedding",
    "KronDecoder",
    "KronEmbedding",
    "KronLinear",
    "LowRankLinear",
    "PackedKronLinear",
    "QuantizedAdaptiveEmbedding",
    "QuantizedKronEmbedding",
    "QuantizedKronLinear",
    "QuantizedLowRankLinear",
    "Shape",
    "Shapes",
    "TiedDecoder",
    "fit_adaptive",
    "fit_embedding",
    "fit_linear",
    "fit_low_rank",
    "is_quantized",
]
