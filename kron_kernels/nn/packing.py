"""Packed factors, kept between calls and made anew when a parameter has changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..fused import pack_factors


class _Entry(NamedTuple):
    # Detached, they share memory and version counter with the parameters: an address cannot be given to another
    # parameter while they live, and every in-place change shows in the counter.
    a: Tensor
    b: Tensor
    versions: tuple[int, int]
    packed: Tensor


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
        if not a.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if a.is_inference() or b.is_inference():  # no version counter: a change could not be told
            return None
        entry = self._entry
        if (
            entry is None
            or entry.versions != (a._version, b._version)
            or entry.a.data_ptr() != a.data_ptr()
            or entry.b.data_ptr() != b.data_ptr()
            or entry.a.dtype is not a.dtype
            or entry.a.shape != a.shape
        ):
            entry = _Entry(a.detach(), b.detach(), (a._version, b._version), pack_factors(a, b))
            self._entry = entry
        return entry.packed

    def clear(self) -> None:
        self._entry = None

    # A copy or a pickle of a module starts with nothing packed.
    def __deepcopy__(self, memo: object) -> FactorCache:
        return FactorCache()

    def __reduce__(self) -> tuple[type[FactorCache], tuple[()]]:
        return FactorCache, ()
