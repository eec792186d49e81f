"""What a measurement ran on, and how fast that machine multiplies matrices at best."""

from __future__ import annotations

import functools
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import __version__, backends
from .interleaving import Variant


def describe_machine() -> dict[str, str | int]:
    """Processor, instruction set in use, cores, threads and versions: what a figure needs beside it to be read."""
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


def gemm_peak_gflops(dtype: torch.dtype, sizes: tuple[int, ...] = (1024, 1536, 2048), repeats: int = 5) -> float:
    """Best rate of a square ``torch.mm`` in ``dtype`` on torch's threads, GFLOP/s.

    A stand-in for the multiply-add peak: what a well-tuned library reaches on this machine, a few percent below it.
    """
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype)
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


@dataclass(frozen=True)
class GemmPeak:
    """A square ``torch.mm`` to run among other variants: their rates are shares of its rate in the same round.

    Attributes:
        variant: ``(size, size) @ (size, size)`` into a given output.
        flop: operations of one call.
        label: sizes and dtype, for tables.
    """

    variant: Variant
    flop: int
    label: str


PEAK = "square torch.mm"


@functools.cache
def gemm_peak(dtype: torch.dtype, size: int = 1024) -> GemmPeak:
    """The square product in ``dtype``; in float32 instead of bfloat16 where that is quicker.

    Without matrix units for it, bfloat16 is best multiplied in float32, and the peak is then that of float32.
    """
    if dtype is torch.bfloat16:
        dtype = max((dtype, torch.float32), key=lambda each: gemm_peak_gflops(each, (size,)))
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    label = f"{size}x{size}, {str(dtype).removeprefix('torch.')}"
    return GemmPeak(Variant(PEAK, lambda: torch.mm(left, right, out=out)), 2 * size**3, label)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
