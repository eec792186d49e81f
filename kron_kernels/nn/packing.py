"""Packed factors, kept between calls and made anew when a parameter has changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import pack_factors


class _Entry(NamedTuple):
    a: Tensor
    b: Tensor
    # Detached, they share memory and version counter with the parameters: an address cannot be given to another
    # parameter while they live, and every in-place change shows in the counter.
    a_then: Tensor
    b_then: Tensor
    a_version: int
    b_version: int
    packed: Tensor

    def holds(self, a: Tensor, b: Tensor) -> bool:
        """Whether these are the factors that were packed: the same memory, read the same way, and unchanged."""
        return (
            a is self.a
            and b is self.b
            and a._version == self.a_version
            and b._version == self.b_version
            and a.is_set_to(self.a_then)
            and b.is_set_to(self.b_then)
            and a.dtype is self.a_then.dtype
        )


class FactorCache:
    """What ``pack_factors`` made of one pair of factors, as long as it holds good.

    It is made anew after any in-place change (optimizer steps and ``load_state_dict`` are such), another parameter in
    place of the old, and a move to another device or dtype. Writes through ``.data``, which torch does not count, are
    noticed by the kernels where they touch more than a few elements; ``clear()`` is for the rest.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, a: Tensor, b: Tensor) -> Tensor | None:
        """The packed factors, None where nothing is to be gained: in training, under a compiler, off the CPU."""
        if torch.is_grad_enabled() or not a.is_cpu or torch.compiler.is_compiling():
            return None
        entry = self._entry
        if entry is None or not entry.holds(a, b):
            if a.is_inference() or b.is_inference():  # no version counter: a change could not be told
                return None
            entry = _Entry(a, b, a.detach(), b.detach(), a._version, b._version, pack_factors(a, b))
            self._entry = entry
        return entry.packed

    def clear(self) -> None:
        self._entry = None

    # A copy or a pickle of a module starts with nothing packed.
    def __reduce__(self) -> tuple[type[FactorCache], tuple[()]]:
        return FactorCache, ()
