"""What tests and benchmarks share: timing in turns, peak memory, the machine's description, tables.

Nothing on the compute path imports it.
"""

from .machine import describe_machine
from .memory import peak_memory_growth
from .timing import Variant, interleave

__all__ = ["Variant", "describe_machine", "interleave", "peak_memory_growth"]
