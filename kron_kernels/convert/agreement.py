"""How close a converted model is to the dense one: hidden states, and sentence vectors with their similarities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.inference_mode()
def hidden_agreement(
    model: nn.Module, other: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, centred: bool = False
) -> float:
    """Return the mean cosine of the last hidden states of two encoders, over all tokens that are not padding.

    ``batches`` holds the keyword arguments of calls: ``input_ids (batch, length)`` and, for padded ones,
    ``attention_mask``. A model with a head is compared by its encoder. ``centred`` takes each batch's mean off the
    states first: an encoder's states share a direction, which keeps the plain cosine high whatever else they hold.
    Raises ValueError where there is no token.
    """
    total, tokens = 0.0, 0
    for batch in batches:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        wanted, got = (
            getattr(each, "base_model", each)(**batch).last_hidden_state[real].double() for each in (model, other)
        )
        if centred:
            wanted, got = wanted - wanted.mean(0), got - got.mean(0)
        cosines = F.cosine_similarity(wanted, got, dim=-1)
        total, tokens = total + float(cosines.sum()), tokens + cosines.numel()
    if not tokens:
        raise ValueError("batches: expected at least one token, got none")
    return total / tokens


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average hidden states (B, L, d) over the tokens of a mask (B, L) and scale them to length one: (B, d)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


@torch.inference_mode()
def sentence_vectors(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Compute the mean-pooled unit vectors (N, d), float32, of the sentences of all batches, in their order."""
    encoder: Any = getattr(model, "base_model", model)
    vectors = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        vectors.append(mean_pool(encoder(**batch).last_hidden_state, mask).float())
    return torch.cat(vectors)


def vector_agreement(wanted: Tensor, got: Tensor) -> dict[str, float]:
    """Compare unit vectors (N, d) of two models.

    Returns the mean ``cosine`` of both vectors of a sentence, the ``correlation`` of the similarities of all pairs, and
    ``same neighbour``, the share of sentences whose nearest other sentence is the same.
    """
    above = torch.triu_indices(len(wanted), len(wanted), offset=1)
    both = [vectors @ vectors.T for vectors in (wanted, got)]
    pairs = torch.stack([similarities[above[0], above[1]] for similarities in both])
    nearest = [similarities.fill_diagonal_(-1).argmax(1) for similarities in both]
    return {
        "cosine": float((wanted * got).sum(-1).mean()),
        "correlation": float(torch.corrcoef(pairs)[0, 1]),
        "same neighbour": float((nearest[0] == nearest[1]).float().mean()),
    }
