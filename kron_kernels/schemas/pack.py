"""Packed factors: what ``kron_pack`` returns, for models whose weights no longer change.

``kron_pack(a, b)`` gives a uint8 tensor (N,): a head of 64 bytes (magic number, shapes, dtype, layout), then the panels
of one of the two factors, the one of the GEMM and usually the larger, as the CPU kernels read them at the
instruction-set level in use (packed.h). An op that is given these bytes as ``packed`` reads no element of that
plain factor: a stand-in of its shape will do, ``zeros(1).expand(S, m, n)``. The other factor stays plain. Bytes of
other shapes, another dtype or another level are an error. Where no CPU kernels are, ``kron_pack`` packs nothing and
returns no bytes, which mean the same as None; other backends read plain factors and take no packed ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import define

# Of PackedHead: 1 where the panels are those of a.
_PACKS_A = 55


def packed_factor(packed: Tensor) -> str:
    """Return which factor the bytes of ``kron_pack`` replace, "a" or "b". They must not be empty."""
    return "a" if packed[_PACKS_A].item() else "b"


def reject_packed(*packed: Tensor | None) -> None:
    """Raise ValueError where there are packed factors: of a backend that reads the plain ones."""
    if any(tensor is not None and tensor.numel() > 0 for tensor in packed):
        raise ValueError(
            "packed: expected none on a backend that reads plain factors, got what kron_pack made for the CPU kernels; "
            "use the model as it was before optimize_for_inference"
        )


def _reference(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(0, dtype=torch.uint8)  # the reference has no layout of its own


kron_pack = define("kron_pack", "(Tensor a, Tensor b) -> Tensor", _reference, None)
