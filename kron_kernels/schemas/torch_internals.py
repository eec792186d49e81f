"""Everything that torch tells only through private names, in one place: transforms, dispatch keys, the raw apply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_kernel(op: str, device_type: str) -> bool:
    """Tell whether the op ``kron_kernels::op`` has a kernel of its own for "cpu" or "cuda", not the reference alone."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kron_kernels::{op}", device_type.upper())


def functorch_is_active() -> bool:
    """Tell whether a function transform (``torch.func``, ``torch.vmap``) takes part in this call."""
    return torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result  # a compiler guards this level itself
def forward_mode_is_active() -> bool:
    """Tell whether tensors may carry tangents: inside ``forward_ad.dual_level`` and the transforms built on it."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Tell whether a compiler or a function transform takes part in this call."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Tell whether a gradient or a tangent may be asked of a function of these tensors."""
    # A tensor wrapped by a torch.func transform does not show the levels below it: always differentiable then.
    if torch._C._are_functorch_transforms_active() or forward_mode_is_active():
        return True
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 (the generator of any() costs half a microsecond)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def is_observed(*tensors: Tensor | None) -> bool:
    """Tell whether autograd, autocast on the CPU, a transform or a compiler takes part in this call."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or needs_autograd(*tensors)


def in_place_is_observed() -> bool:
    """Tell whether a compiler, a function transform or a dispatch mode takes part in this call.

    Those may keep results, as selective checkpointing does, or have no memory to write to, as fake tensors.
    """
    return is_transformed() or bool(torch._C._len_torch_dispatch_stack())


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without inspecting its signature on every call, which costs as much as five small products."""
    if is_transformed():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
