"""What CUDA devices are and what torch lets them do, for every backend that asks."""

from __future__ import annotations

import functools

import torch

# Most bytes of shared memory that a block may ask for, by compute capability (CUDA programming guide, technical
# specifications); the least of all where nothing is listed.
_SHARED = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024, 110: 227 * 1024}
_LEAST_SHARED = 99 * 1024


@functools.cache
def arch(index: int) -> int | str:
    """Of a device: 80, 90, ... of CUDA, or a name such as "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else 10 * properties.major + properties.minor


def shared_memory(sm: int) -> int:
    """Most bytes of shared memory a block of a CUDA device, by its compute capability."""
    return _SHARED.get(sm, _LEAST_SHARED)


def allows_tf32() -> bool:
    """Whether float32 may go through the tensor cores in TF32: as torch's setting for its own products says."""
    return torch.get_float32_matmul_precision() != "highest"
