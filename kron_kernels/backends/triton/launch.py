"""Operands as the kernels take them, and one way to start a kernel: without Triton's own look-ups once it is compiled.

Triton binds, hashes and compares the arguments of every launch in Python. Here the key is made of what changes the
machine code and nothing else, and a launch that has been seen calls the compiled kernel directly.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..base import Device
from ..devices import allows_tf32, arch, shared_memory

INTERPRETED = bool(triton.knobs.runtime.interpret)

_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Options(NamedTuple):
    """Warps of a program, and stages of its loads in flight."""

    num_warps: int
    num_stages: int


# The interpreter has no device; the numbers are an A100's.
_INTERPRETER = Device(80, 108, shared_memory(80))


def rows(tensor: Tensor) -> Tensor:
    """``(..., n)`` as ``(T, n)`` with its last dimension contiguous; a copy only where that needs one."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def precision() -> str:
    """How float32 operands go through the tensor cores: as torch's setting for its own products says."""
    return "tf32" if allows_tf32() else "ieee"


def is_exact(x: Tensor) -> bool:
    """Whether products are of float32 operands as they are: without the tensor cores."""
    return x.dtype is torch.float32 and not allows_tf32()


class Launch(NamedTuple):
    """One launch, as ``recording`` keeps it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: Options


# Launches remembered; each is some hundred bytes, and forgetting one costs the next a look-up by Triton.
_MOST_KEPT = 16384
_compiled: dict[tuple[Any, ...], Any] = {}
_recorder: tuple[Device, list[Launch]] | None = None


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Inside, launches are kept in the list and not run, with plans made for ``device``: to compile without one."""
    global _recorder
    before = _recorder
    _recorder = (device, [])
    try:
        yield _recorder[1]
    finally:
        _recorder = before


def device_of(tensor: Tensor) -> Device:
    if _recorder is not None:
        return _recorder[0]
    return _INTERPRETER if INTERPRETED else _device(tensor.device.index or 0)


@functools.cache
def _device(index: int) -> Device:
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Device(arch(index), multiprocessors, shared)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options
) -> None:
    """Run ``kernel[grid](*arguments, *constants)``: tensors, None, integers and floats, then all constexpr parameters.

    Raises RuntimeError with the kernel and its constants where it cannot be compiled or started.
    """
    if any(size > limit for size, limit in zip(grid, _GRID_LIMITS, strict=False)):
        raise RuntimeError(
            f"{kernel.fn.__name__}: a grid of {grid} programs is more than the {_GRID_LIMITS} there can be"
        )
    if _recorder is not None:
        _recorder[1].append(Launch(kernel, grid, arguments, constants, options))
        return
    if INTERPRETED:
        kernel[grid](*arguments, *constants)
        return
    # Integers by value, which is quicker than telling those apart that Triton compiles different code for.
    key = (
        kernel,
        constants,
        options,
        torch.cuda.current_device(),
        *[_of_tensor(a) if isinstance(a, Tensor) else a for a in arguments],
    )
    try:
        runner = _compiled.get(key)
        if runner is None:
            if len(_compiled) >= _MOST_KEPT:
                _compiled.clear()
            _compiled[key] = kernel[grid](*arguments, *constants, num_warps=options[0], num_stages=options[1])
        else:
            padded = (*grid, 1, 1)
            runner[padded](*arguments, *constants)
    except Exception as error:
        raise RuntimeError(f"Triton kernel {name_of(kernel, constants, options)} failed: {error}") from error


def _of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor changes the machine code: type, alignment and, on AMD, whether its offsets fit 32 bits."""
    if torch.version.hip:
        return tensor.dtype, tensor.data_ptr() % 16, tensor.untyped_storage().nbytes() < 2**31
    return tensor.dtype, tensor.data_ptr() % 16


def name_of(kernel: Any, constants: tuple[Any, ...], options: Options) -> str:
    names = kernel.arg_names[-len(constants) :]
    values = ", ".join(f"{name}={value}" for name, value in zip(names, constants, strict=True))
    return f"{kernel.fn.__name__}({values}) with {options.num_warps} warps and {options.num_stages} stages"
