"""Peak resident memory of one call, as the operating system sees it: tensors, kernel scratch and library buffers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_memory_growth(run: Callable[[], object]) -> int | None:
    """Return the bytes by which the resident set peaked above its level before ``run()``, its results included.

    None where the system cannot tell. The allocator must hand memory back for this to see it: start the process with
    small ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_``. Call ``run`` once on a small input before, so that
    thread stacks and code pages are not counted.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # "5" resets the peak to the present resident set
        before = process_bytes("VmRSS")
        result = run()
        peak = process_bytes("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before)


def process_bytes(field: str) -> int:
    """Return a figure of ``/proc/self/status`` in bytes: "VmRSS", "VmHWM" (its peak). Raises OSError without it."""
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS}: no {field}")
    return int(match.group(1)) * 1024
