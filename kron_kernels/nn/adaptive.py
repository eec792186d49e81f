"""AdaptiveEmbedding: bands of the vocabulary by frequency, each a low-rank table; and its fit to a dense one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..factorize.low_rank import principal_rows
from ..schemas.reference import take_rows
from .decoder import TiedDecoder

Bands = Sequence[tuple[int, int]]


class Tables(nn.ParameterList):
    """Matrices, one a band."""

    def whole(self, band: int) -> Tensor:
        """The matrix of a band."""
        return self[band]

    def gather(self, band: int, index: Tensor) -> Tensor:
        """Rows of a band's matrix, (..., columns), for ``index (...)``."""
        return F.embedding(index, self[band])


class AdaptiveEmbedding(nn.Module):
    """nn.Embedding whose frequent tokens have more numbers than rare ones (Baevski and Auli, 2019).

    ``bands`` are pairs ``(tokens, rank)``, the most frequent tokens first, which together cover the vocabulary. The row
    of a token in band i is ``tables[i][row] @ projections[i] + means[i]``, with ``tables[i] (tokens, rank)``,
    ``projections[i] (rank, embedding_dim)`` and ``means (bands, embedding_dim)``. The buffer ``places
    (num_embeddings,)``, of the smallest integers that hold it, is each token's place in the order of frequency. One
    band is a low-rank embedding.

    ``padding_idx`` means what it means in nn.Embedding: looking it up gives no gradient. An index out of range raises
    IndexError; bands that do not cover the vocabulary, or a rank above the width, ValueError.
    """

    places: Tensor
    padding_idx: int | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bands: Bands,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if sum(tokens for tokens, _ in bands) != num_embeddings or any(tokens < 1 for tokens, _ in bands):
            raise ValueError(f"bands: expected positive counts that sum to {num_embeddings}, got {list(bands)}")
        if not all(1 <= rank <= embedding_dim for _, rank in bands):
            raise ValueError(f"bands: expected ranks from 1 to embedding_dim = {embedding_dim}, got {list(bands)}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected an index into {num_embeddings} embeddings, got {padding_idx}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bands = tuple((tokens, rank) for tokens, rank in bands)
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings
        self.tables = Tables(torch.empty(tokens, rank, **factory) for tokens, rank in bands)
        self.projections = Tables(torch.empty(rank, embedding_dim, **factory) for _, rank in bands)
        self.means = nn.Parameter(torch.empty(len(bands), embedding_dim, **factory))
        smallest = torch.int16 if num_embeddings <= 2**15 else torch.int32
        self.register_buffer("places", torch.empty(num_embeddings, dtype=smallest, device=device))
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.means.dtype

    def reset_parameters(self, std: float = 1.0) -> None:
        """Draw the bands so that the rows' entries have standard deviation ``std``; tokens keep the order of ids."""
        for table, projection in zip(self.tables, self.projections, strict=True):
            nn.init.normal_(table)
            nn.init.normal_(projection, std=std / math.sqrt(len(projection)))
        nn.init.zeros_(self.means)
        self.reset_places()
        with torch.no_grad():
            place = -1 if self.padding_idx is None else self.padding_idx
            for table in self.tables:
                if 0 <= place < len(table):
                    table[place] = 0  # its band's mean, which is zero
                place -= len(table)

    def reset_places(self) -> None:
        """Let tokens come in the order of their ids, as vocabularies made by frequency do."""
        self.places.copy_(torch.arange(self.num_embeddings))

    def forward(self, ids: Tensor) -> Tensor:
        place = take_rows(self.places.unsqueeze(-1), ids, "ids").squeeze(-1).to(torch.int64)
        codes, members, start = [], [], 0
        for band, (tokens, _) in enumerate(self.bands):
            inside = ((place >= start) & (place < start + tokens)).unsqueeze(-1)
            row = self.tables.gather(band, (place - start).clamp(0, tokens - 1))
            codes.append(torch.where(inside, row, row.new_zeros(())))
            members.append(inside.to(row.dtype))
            start += tokens
        # One product for all bands: a token's code is zero outside its own, and each band's mean is one more row.
        projections = map(self.projections.whole, range(len(self.bands)))
        rows = torch.cat([*codes, *members], -1) @ torch.cat([*projections, self.means])
        if self.padding_idx is None or not torch.is_grad_enabled():
            return rows
        return torch.where((ids == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    def decode(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits ``hidden @ table^T + bias`` (..., num_embeddings) of ``hidden (..., embedding_dim)``."""
        logits = [
            F.linear(F.linear(hidden, projection), table) + (hidden @ mean).unsqueeze(-1)
            for table, projection, mean in self._parts()
        ]
        by_token = torch.cat(logits, -1).index_select(-1, self.places.int())
        return by_token if bias is None else by_token + bias

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield table, projection and mean of every band."""
        for band in range(len(self.bands)):
            yield self.tables.whole(band), self.projections.whole(band), self.means[band]

    def tied_decoder(self, bias: nn.Parameter | None = None) -> TiedDecoder:
        """An output layer that reads this embedding's table."""
        return TiedDecoder(self, bias)

    def dense_weight(self) -> Tensor:
        """The table (num_embeddings, embedding_dim), built in full; differentiable."""
        by_place = torch.cat([table @ projection + mean for table, projection, mean in self._parts()])
        return by_place.index_select(0, self.places.int())

    def to_embedding(self) -> nn.Embedding:
        """The dense embedding with the same table."""
        table = self.dense_weight().detach()
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=self.padding_idx).train(self.training)

    @torch.no_grad()
    def resized(self, size: int) -> AdaptiveEmbedding:
        """A copy with ``size`` tokens: the last ids are cut off, or added to the last band as its mean.

        Raises ValueError where a band would be empty.
        """
        kept = min(size, self.num_embeddings)
        order = self.places.argsort()  # ids by place
        tables, ids, start = [], [], 0
        for table in self.tables:
            members = order[start : start + len(table)]
            tables.append(table[members < kept])
            ids.append(members[members < kept])
            start += len(table)
        added = torch.arange(kept, size, device=order.device)
        tables[-1] = torch.cat([tables[-1], tables[-1].new_zeros(len(added), tables[-1].shape[1])])
        bands = [(len(table), table.shape[1]) for table in tables]
        padding = None if self.padding_idx is None or self.padding_idx >= size else self.padding_idx
        factory: dict[str, Any] = {"device": self.means.device, "dtype": self.means.dtype}
        new = AdaptiveEmbedding(size, self.embedding_dim, bands, padding, **factory)
        for mine, theirs in zip(new.tables, tables, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(new.projections, self.projections, strict=True):
            mine.copy_(theirs)
        new.means.copy_(self.means)
        new.places[torch.cat([*ids, added])] = torch.arange(size, device=order.device, dtype=new.places.dtype)
        return new.requires_grad_(self.means.requires_grad)

    def extra_repr(self) -> str:
        bands = ", ".join(f"{tokens}x{rank}" for tokens, rank in self.bands)
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, bands={bands}"


def frequency_order(size: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return token ids by falling count, those alike by id, and the weight of every id: the root of its count.

    ``counts (size,)`` may be None. Vocabularies are made by frequency, so that ids say something where no count does.
    Raises ValueError for counts of another shape.
    """
    if counts is not None and counts.shape != (size,):
        raise ValueError(f"counts: expected shape ({size},), got {tuple(counts.shape)}")
    counts = torch.zeros(size) if counts is None else counts.cpu()
    return counts.argsort(descending=True, stable=True), (counts.double() + 0.3).sqrt()


@torch.no_grad()
def fit_adaptive(
    embedding: nn.Embedding, bands: Bands, counts: Tensor | None = None
) -> tuple[AdaptiveEmbedding, float]:
    """Fit an AdaptiveEmbedding to a dense one; return it with its relative error, weighted by frequency.

    ``counts (num_embeddings,)`` says how often each token occurs in sample text; tokens that are not seen, and all
    without it, keep the order of their ids, in which vocabularies made by frequency come. The bands' tokens are the
    most frequent ones; each band's rows are fitted by their principal directions, weighted by the square root of the
    count. Raises ValueError as the module does, for counts of another shape, and for an embedding with ``max_norm``,
    ``scale_grad_by_freq`` or ``sparse``.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise ValueError("embedding: expected one without max_norm, scale_grad_by_freq and sparse")
    weight = embedding.weight.detach()
    size = len(weight)
    order, weights = frequency_order(size, counts)
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    layer = AdaptiveEmbedding(size, weight.shape[1], bands, embedding.padding_idx, **options)
    start, lost = 0, 0.0
    for band, (tokens, rank) in enumerate(layer.bands):
        members = order[start : start + tokens].to(weight.device)
        share, rows = weights.to(weight.device)[members], weight[members]
        for target, value in zip(
            (layer.tables[band], layer.projections[band], layer.means[band]),
            principal_rows(rows, share, rank),
            strict=True,
        ):
            target.copy_(value)
        start += tokens
    layer.places[order] = torch.arange(size, device=layer.places.device, dtype=layer.places.dtype)
    by_row = (layer.dense_weight() - weight).double().square().sum(1), weight.double().square().sum(1)
    lost, whole = (float(each @ weights.to(weight.device)) for each in by_row)
    return layer.train(embedding.training), (lost / whole) ** 0.5 if whole > 0 else 0.0
