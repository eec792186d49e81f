"""Output layers that share the word embedding's weight: found before a conversion, tied to its factors after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn import AdaptiveEmbedding, KronEmbedding


def tied_decoders(model: nn.Module, embedding: nn.Module) -> list[str]:
    """List the names of the linear layers whose weight is the embedding's."""
    if not isinstance(embedding, nn.Embedding):
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is embedding.weight
    ]


def tie_decoders_(model: nn.Module, decoders: list[str], embedding: KronEmbedding | AdaptiveEmbedding) -> None:
    """Replace the named output layers by decoders on the embedding's factors, and tell transformers of the ties."""
    factors: tuple[str, ...] = ()
    for name in decoders:
        dense: Any = model.get_submodule(name)
        decoder = embedding.tied_decoder(dense.bias)
        factors = tuple(key for key in decoder.state_dict() if key != "bias")
        model.set_submodule(name, decoder)
    for prefix, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None)
        if not isinstance(tied, Mapping):
            continue
        # transformers reads these keys as regular expressions: without its end, "b" would match "bias" too.
        module._tied_weights_keys = _factor_ties(tied, prefix, decoders, factors, end="$")
        module.all_tied_weights_keys = _factor_ties(module.all_tied_weights_keys, prefix, decoders, factors, end="")


def _factor_ties(
    tied: Mapping[str, str], prefix: str, decoders: list[str], factors: tuple[str, ...], end: str
) -> dict[str, str]:
    """Turn ties of a decoder's weight, or of factors it had, to an embedding's into ties of these factors."""
    ties = {}
    for target, source in tied.items():
        layer, _, tied_tensor = target.removesuffix("$").rpartition(".")
        if tied_tensor in ("weight", "a", "b") and (f"{prefix}.{layer}" if prefix else layer) in decoders:
            for factor in factors:
                ties[f"{layer}.{factor}{end}"] = f"{source.rpartition('.')[0]}.{factor}"
        else:
            ties[target] = source
    return ties
