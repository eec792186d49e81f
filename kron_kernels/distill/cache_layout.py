"""What a teacher's cache keeps of each example, and how large that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Entry(NamedTuple):
    """An output: (length, width) an example, (layers, length, width) of several layers, or one vector (width,)."""

    name: str
    width: int
    layers: int | None
    per_token: bool

    @property
    def elements(self) -> int:
        """Numbers a token, or an example that has one vector."""
        return self.width * (self.layers or 1)

    def shape(self, batch: int, length: Any) -> tuple[Any, ...]:
        """The shape of a batch of that padded length."""
        layers = () if self.layers is None else (self.layers,)
        return (batch, *layers, length, self.width) if self.per_token else (batch, self.width)


def layout(widths: Mapping[str, int | tuple[int, int]], example_widths: Mapping[str, int]) -> list[Entry]:
    """The outputs by what ``TeacherCache.open`` is given; ValueError for bad names and numbers."""
    entries = [
        Entry(name, width, None, True) if isinstance(width, int) else Entry(name, width[1], width[0], True)
        for name, width in widths.items()
    ]
    entries += [Entry(name, width, None, False) for name, width in example_widths.items()]
    if not entries or widths.keys() & example_widths.keys():
        raise ValueError("widths: expected one or more outputs, none of them in example_widths too")
    for entry in entries:
        if not entry.name.isidentifier():
            raise ValueError(f"widths: expected names of letters, digits and underscores, got {entry.name!r}")
        if entry.width < 1 or (entry.layers is not None and entry.layers < 1):
            raise ValueError(f"widths: expected positive numbers for {entry.name}, got {entry.layers, entry.width}")
    return entries


def total_bytes(lengths: np.ndarray, entries: Sequence[Entry], dtype: torch.dtype) -> int:
    """Bytes of the outputs of examples of so many tokens, ``lengths`` (examples,)."""
    tokens = int(lengths.sum())
    return dtype.itemsize * sum(entry.elements * (tokens if entry.per_token else len(lengths)) for entry in entries)
