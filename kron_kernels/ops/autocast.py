"""Autocast as ``F.linear`` has it: which operands it casts, and where it takes part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast_for_autocast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast what ``F.linear`` would cast under autocast: floating tensors of the device, float64 apart."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None
        and tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and tensor.device.type == device_type
        else tensor
        for tensor in tensors
    )


def autocasts(device_type: str) -> bool:
    """Tell whether autocast takes part on devices of a type; meta has none, and asking torch about it is an error."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
