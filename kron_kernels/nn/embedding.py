"""KronEmbedding, its fit to a dense embedding, and the decoder tied to it."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from ..factorize import KronFactors, nearest_kronecker
from ..ops import kron_matmul
from ..schemas.reference import take_rows
from .factored import KronFactored, empty_factors


class KronEmbedding(KronFactored):
    """nn.Embedding whose table is ``sum_s A_s (x) B_s`` with a row vector B: row i is ``sum_s A_s[i] (x) B_s``.

    ``a`` is ``(S, num_embeddings, embedding_dim / factor)`` and ``b`` ``(S, 1, factor)``, so a look-up gathers
    ``embedding_dim / factor`` values and expands them; the table is never built. ``padding_idx`` means what it means
    in nn.Embedding: its row starts at zero and looking it up gives no gradient. An index out of range raises
    IndexError. Raises ValueError where ``factor`` does not divide ``embedding_dim`` or ``padding_idx`` is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        factor: int,
        terms: int = 1,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if factor < 1 or embedding_dim % factor:
            raise ValueError(f"factor: expected a divisor of embedding_dim = {embedding_dim}, got {factor}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected an index into {num_embeddings} embeddings, got {padding_idx}")
        shapes = ((num_embeddings, embedding_dim // factor), (1, factor))
        super().__init__(*empty_factors(shapes, terms, {"device": device, "dtype": dtype}))
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        return self.shapes[0][0]

    def reset_parameters(self, std: float = 1.0) -> None:
        """Draw the factors so that the table's entries have standard deviation ``std`` (nn.Embedding's is 1)."""
        self.init_factors(std)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.a[:, self.padding_idx].zero_()

    def gather(self, ids: Tensor) -> list[Tensor]:
        """The rows of A for token ids ``(...)``: of each term a tensor ``(..., embedding_dim / factor)``."""
        return [take_rows(a, ids, "ids") for a in self.a]

    def forward(self, ids: Tensor) -> Tensor:
        # (..., p, 1) * (1, k) -> (..., p * k)
        rows = (row.unsqueeze(-1) * b for row, b in zip(self.gather(ids), self.b, strict=True))
        out = reduce(torch.add, rows).flatten(-2)
        if self.padding_idx is None or not torch.is_grad_enabled():
            return out
        return torch.where((ids == self.padding_idx).unsqueeze(-1), out.detach(), out)

    def decode(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits ``hidden @ table^T + bias`` (..., num_embeddings) of ``hidden (..., embedding_dim)``."""
        return kron_matmul(hidden, self.a, self.b, bias)

    def tied_decoder(self, bias: nn.Parameter | None = None) -> KronDecoder:
        """An output layer that shares this embedding's factors."""
        return KronDecoder(self.a, self.b, bias)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, factor: int, terms: int = 1) -> KronEmbedding:
        """The nearest Kronecker embedding to ``embedding`` (see ``fit_embedding``)."""
        return fit_embedding(embedding, factor, terms)[0]

    def to_embedding(self) -> nn.Embedding:
        """The dense embedding with the same table."""
        table = self.dense_weight().detach()
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=self.padding_idx).train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self.factor_repr()}"


class KronDecoder(KronFactored):
    """Output layer over the vocabulary, ``hidden (A (x) B)^T + bias``, on factors shared with a KronEmbedding.

    ``a (S, V, d/k)`` and ``b (S, 1, k)`` are kept as they come, so that parameters stay tied.
    """

    def __init__(self, a: nn.Parameter, b: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__(a, b)
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        return kron_matmul(hidden, self.a, self.b, self.bias)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, {self.factor_repr()}"


def fit_embedding(embedding: nn.Embedding, factor: int, terms: int = 1) -> tuple[KronEmbedding, KronFactors]:
    """The nearest Kronecker embedding to ``embedding``, and the fit with its error.

    Raises ValueError for an embedding that renormalises (``max_norm``) or treats gradients in its own way
    (``scale_grad_by_freq``, ``sparse``), and where ``factor`` does not divide its width.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise ValueError("embedding: expected one without max_norm, scale_grad_by_freq and sparse")
    weight = embedding.weight.detach()
    rows, dim = weight.shape
    if factor < 1 or dim % factor:
        raise ValueError(f"factor: expected a divisor of embedding_dim = {dim}, got {factor}")
    factors = nearest_kronecker(weight, (rows, dim // factor), terms)
    layer = KronEmbedding(rows, dim, factor, terms, embedding.padding_idx, device=weight.device, dtype=weight.dtype)
    layer.load_factors(factors.a, factors.b)
    return layer.train(embedding.training), factors
