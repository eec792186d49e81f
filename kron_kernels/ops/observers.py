"""Who takes part in a call besides its caller: autograd, autocast, function transforms, a compiler."""

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
    """Whether autocast takes part on devices of a type; meta has none, and asking it is an error."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def is_transformed() -> bool:
    """Whether a compiler or a function transform takes part in this call."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_observed(*tensors: Tensor | None) -> bool:
    """Whether autograd, autocast, a transform or a compiler takes part in this call."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or needs_autograd(*tensors)


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of a product of these tensors."""
    # A tensor wrapped by a torch.func transform does not show the levels below it: always the differentiable way then.
    if torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 (the generator of any() costs half a microsecond)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def in_place_is_observed() -> bool:
    """Whether a compiler, a function transform or a dispatch mode looks on, which may keep results or have no memory:
    selective checkpointing and fake tensors."""
    return is_transformed() or bool(torch._C._len_torch_dispatch_stack())


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without inspecting its signature on every call, which costs as much as five small products."""
    if is_transformed():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
