"""How close a converted model is to the dense one: cosine of hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
