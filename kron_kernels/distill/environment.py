"""What a process runs on, and how much memory it took."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from typing import Any

import torch

from ..testing import describe_machine


def describe_environment() -> dict[str, Any]:
    """Machine, versions and device of this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**describe_machine(), "transformers": importlib.metadata.version("transformers"), "device": device}


def peak_memory() -> int:
    """Bytes: of the GPU's allocator where there is one, else the largest resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
