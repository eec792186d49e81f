"""Factors in the layout of the CPU kernels, made once for many calls."""

from __future__ import annotations

from torch import Tensor

from ..schemas.pack import kron_pack
from ..schemas.product import stacks


def pack_factors(a: Tensor, b: Tensor) -> Tensor:
    """Bring ``a (S, m1, n1)`` and ``b (S, m2, n2)`` into the layout of the CPU kernels, once for many calls.

    Returns bytes that mean something to this build, on a processor of this kind, as long as ``a`` and ``b`` keep their
    values: pass them as ``packed`` along with the same factors. Empty where no compiled kernels are.
    """
    a, b = stacks(a, b)
    return kron_pack(a.detach(), b.detach())
