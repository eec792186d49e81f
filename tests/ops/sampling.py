"""Which cases of a table run in which dtype and at which instruction-set level: a sample, not a product of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kron_kernels import backends

HAS_CPU = backends.available()["cpu"]
needs_extension = pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]
OPS = torch.ops.kron_kernels


def levels() -> list[str]:
    """The instruction-set levels that this machine and build have, the highest first."""
    if not HAS_CPU.available:
        return ["portable"]
    there = [level for level in backends.CPU_ISA_LEVELS if backends.set_cpu_isa(level) == level]
    backends.set_cpu_isa("amx")
    return there[::-1]


TOP, *LOWER = levels()
ELSEWHERE = [(torch.float64, TOP), (torch.float16, TOP), *((torch.float32, level) for level in LOWER)]
ELSEWHERE += [(dtype, level) for level in LOWER[:1] for dtype in (torch.bfloat16, torch.float64, torch.float16)]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sampled(cases: Sequence[Any], step: int = 1, others: int = 12) -> Callable[..., Any]:
    """Parametrise ``case``, ``dtype`` and ``isa``: the tuned dtypes at the top level, a dozen cases of all else."""
    some = cases[::step]
    chosen = [(case, dtype, TOP) for case in some for dtype in (torch.float32, torch.bfloat16)]
    stride = max(1, len(cases) // others)
    for index, case in enumerate(cases[1::stride][:others]):
        chosen.append((case, *ELSEWHERE[index % len(ELSEWHERE)]))
    names = [f"{getattr(case, 'id', case)}-{short(dtype)}-{isa}" for case, dtype, isa in chosen]
    return pytest.mark.parametrize(("case", "dtype", "isa"), chosen, ids=names, indirect=["isa"])
