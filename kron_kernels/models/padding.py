"""Batches without their padding: the real tokens of all sequences in one row, so that no layer works on the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..schemas.torch_internals import functorch_is_active

# BertModel.forward's own order.
_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
# What attention over one more length of sequence costs, in tokens: a few small calls in each layer.
_TOKENS_PER_LENGTH = 4


class Packing(NamedTuple):
    """The N real tokens of a ``(batch, length)`` grid in one row ``(1, N)``, sequences of the same length together.

    Equally long sequences attend in one call, each to itself, without a mask.
    """

    places: Tensor  # (N,), of each token in the grid read row by row
    lengths: tuple[int, ...]  # one for each group of equally long sequences
    sizes: tuple[int, ...]  # tokens of each group
    grid: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Packing | None:
        """The packing of a mask ``(batch, length)``; None where it would save less than it costs."""
        real = mask.bool()
        lengths: list[int] = real.sum(1).tolist()
        sequences = Counter(length for length in lengths if length)
        if not sequences or real.numel() - sum(lengths) <= _TOKENS_PER_LENGTH * len(sequences):
            return None
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        grid = torch.arange(real.numel()).view(real.shape)
        groups = sorted(sequences.items())
        return cls(
            grid[order][real[order]],
            tuple(length for length, _ in groups),
            tuple(length * count for length, count in groups),
            (real.shape[0], real.shape[1]),
        )

    def pack(self, values: Tensor) -> Tensor:
        """``(1, N, ...)`` of what is given for each token, ``(batch or 1, length, ...)``."""
        whole = values.expand(*self.grid, *values.shape[2:])
        return whole.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def positions(self) -> Tensor:
        """``(1, N)``: each token's place in its sequence, the padding before it counted as in the grid."""
        return (self.places % self.grid[1]).unsqueeze(0)

    def unpack(self, hidden: Tensor) -> Tensor:
        """``(batch, length, m)`` of ``(1, N, m)``, zero where there is no token."""
        whole = hidden.new_zeros(self.grid[0] * self.grid[1], hidden.shape[2])
        return whole.index_copy(0, self.places, hidden[0]).view(*self.grid, -1)

    def sequences(self, projected: Sequence[Tensor], head_size: int) -> Iterator[list[Tensor]]:
        """Views ``(sequences, heads, length, head_size)`` of each ``(1, N, m)``, group by group."""
        for length, *group in zip(self.lengths, *(each[0].split(self.sizes) for each in projected), strict=True):
            shape = (group[0].shape[0] // length, length, -1, head_size)
            yield [each.view(shape).transpose(1, 2) for each in group]


def remove_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a BertModel with fused layers: hand it the real tokens alone, and their ``packing``.

    A mask without padding is dropped. Everything is left as it is in training, for a decoder, on other devices than
    the CPU, while something traces (what is padding is known from the data alone), where hidden states or attentions
    are asked for, where the pooler would read a padding token, and where there is too little padding to gain from.
    Raises ValueError for a mask of another shape than the tokens.
    """
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None or torch.compiler.is_compiling() or type(mask) is not Tensor or not mask.is_cpu or mask.dim() != 2:
        return None
    if len(args) > len(_ARGUMENTS) or torch.jit.is_tracing() or functorch_is_active():
        return None
    config: Any = model.config
    if config.is_decoder:
        return None
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is None:
        return None
    if tokens.shape[:2] != mask.shape:
        raise ValueError(f"attention_mask: expected shape {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}")
    if mask.all():
        given["attention_mask"] = None
        return (), given
    packing = Packing.of(mask) if _may_pack(model, given) else None
    if packing is None:
        return None
    given["attention_mask"] = None
    given["position_ids"] = (
        packing.positions() if given.get("position_ids") is None else packing.pack(given["position_ids"])
    )
    for name in ("input_ids", "token_type_ids", "inputs_embeds"):
        if given.get(name) is not None:
            given[name] = packing.pack(given[name])
    given["packing"] = packing
    return (), given


def _may_pack(model: Any, given: dict[str, Any]) -> bool:
    config, mask = model.config, given["attention_mask"]
    recorded = any(
        given.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")
    )
    layers = model.encoder.layer
    return (
        getattr(config, "padding_free", True)
        and not model.training
        and not recorded
        and not given.get("is_causal", getattr(config, "is_causal", False))
        and config._attn_implementation in ("sdpa", "eager")
        and (model.pooler is None or bool(mask[:, 0].all()))
        # Longer than the position table is an error, and the padded way's to report.
        and mask.shape[1] <= model.embeddings.position_embeddings.num_embeddings
        and all(
            getattr(module, "takes_packing", False)
            for module in (model.encoder, *layers, *(layer.attention.self for layer in layers))
        )
    )
