"""Modules with Kronecker-factored weights: drop-in for nn.Linear and nn.Embedding, and the decoder tied to the latter.

A weight is ``W = sum_s A_s (x) B_s`` with ``a (S, m1, n1)`` and ``b (S, m2, n2)``; it is never built in ``forward``.
The state dict of every module holds ``a``, ``b`` and, where there is one, ``bias``; see ``int8`` for large factors kept
as int8.
"""

from .embedding import KronDecoder, KronEmbedding, fit_embedding
from .factored import Shape, Shapes
from .inference import PackedKronLinear
from .int8 import Int8Factored, Int8KronDecoder, Int8KronEmbedding, Int8KronLinear
from .linear import KronLinear, fit_linear

__all__ = [
    "Int8Factored",
    "Int8KronDecoder",
    "Int8KronEmbedding",
    "Int8KronLinear",
    "KronDecoder",
    "KronEmbedding",
    "KronLinear",
    "PackedKronLinear",
    "Shape",
    "Shapes",
    "fit_embedding",
    "fit_linear",
]
