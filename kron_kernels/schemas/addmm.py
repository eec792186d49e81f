"""The ops ``kron_addmm`` and, into ``base`` itself, ``kron_addmm_``: ``base + alpha * product``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .registry import batched, define, samples


def _reference_in_place(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    base.copy_(reference.kron_addmm(base, x, a, b, alpha))


def _fake(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return base.new_empty(base.shape)


def _fake_in_place(base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    return None


def _vmap(info: Any, in_dims: tuple, base: Tensor, x: Tensor, a: Tensor, b: Tensor, alpha: float) -> tuple[Tensor, int]:
    if in_dims[2] is None and in_dims[3] is None:
        base, x = batched(info.batch_size, in_dims[:2], (base, x))
        return kron_addmm(base, x, a, b, alpha), 0
    each = samples(info.batch_size, in_dims, (base, x, a, b, alpha))
    return torch.stack([kron_addmm(*sample) for sample in each]), 0


kron_addmm = define(
    "kron_addmm",
    "(Tensor base, Tensor x, Tensor a, Tensor b, float alpha) -> Tensor",
    reference.kron_addmm,
    _fake,
    _vmap,
)
kron_addmm_ = define(
    "kron_addmm_",
    "(Tensor(a!) base, Tensor x, Tensor a, Tensor b, float alpha) -> ()",
    _reference_in_place,
    _fake_in_place,
)
