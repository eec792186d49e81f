"""What a measurement ran on, and how fast that machine multiplies matrices."""

from __future__ import annotations

import functools
import os
import platform
import re
import time
from pathlib import Path

import torch

from .. import __version__, backends
from .timing import Variant

PEAK = "square torch.mm"


def describe_machine() -> dict[str, str | int]:
    """Return processor, instruction set in use, cores, threads and versions: what a figure needs beside it."""
    return {
        "cpu": _cpu_model(),
        "arch": platform.machine(),
        "isa": backends.cpu_isa() if backends.available()["cpu"].available else "no compiled kernels",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "threads": torch.get_num_threads(),
        "os": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kron_kernels": __version__,
    }


@functools.cache
def square_product(dtype: torch.dtype, size: int = 1024) -> tuple[Variant, int]:
    """Return a square ``torch.mm`` to time among other variants, and its operations: the machine's practical peak.

    Without matrix units for it bfloat16 is best multiplied in float32: the quicker of the two is taken.
    """
    dtypes = {dtype, torch.float32} if dtype is torch.bfloat16 else {dtype}
    variants = {each: _product(each, size) for each in dtypes}
    return min(variants.values(), key=_quickest), 2 * size**3


def _product(dtype: torch.dtype, size: int) -> Variant:
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return Variant(PEAK, functools.partial(torch.mm, left, right, out=out))


def _quickest(variant: Variant) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        variant.run()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
