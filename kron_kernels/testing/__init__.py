"""Measuring: interleaved ratios, peak memory, and a description of the machine.

Used by ``kron-kernels bench`` and by the benchmarks outside the package; nothing on the compute path imports it.
"""

from .interleaving import Quantiles, Timing, Variant, interleave
from .machine import PEAK, GemmPeak, describe_machine, gemm_peak, gemm_peak_gflops
from .memory import peak_memory_growth

__all__ = [
    "PEAK",
    "GemmPeak",
    "Quantiles",
    "Timing",
    "Variant",
    "describe_machine",
    "gemm_peak",
    "gemm_peak_gflops",
    "interleave",
    "peak_memory_growth",
]
