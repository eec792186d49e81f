"""One way to start a kernel: compiled once for what it is specialised on, then launched without Triton's own look-ups.

Triton binds, hashes and compares the arguments of every launch in Python. Here the key is made of what changes the
machine code and nothing else, and a launch that has been seen calls the compiled kernel directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)

_GRID_LIMIT = 2**31 - 1


class Options(NamedTuple):
    """Warps of a program, and stages of its loads in flight."""

    num_warps: int
    num_stages: int


_compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options
) -> None:
    """Run ``kernel[grid](*arguments, *constants)``: tensors and integers first, then all its constexpr parameters.

    Raises RuntimeError with the kernel and its constants where it cannot be compiled or started.
    """
    if any(size > limit for size, limit in zip(grid, (_GRID_LIMIT, 65535, 65535), strict=False)):
        raise ValueError(f"{_name(kernel)}: expected a grid within {_GRID_LIMIT} x 65535 x 65535 programs, got {grid}")
    if INTERPRETED:
        kernel[grid](*arguments, *constants)
        return
    key = (kernel, constants, options, torch.cuda.current_device(), *map(_specialisation, arguments))
    try:
        runner = _compiled.get(key)
        if runner is None:
            _compiled[key] = kernel[grid](
                *arguments, *constants, num_warps=options.num_warps, num_stages=options.num_stages
            )
        else:
            runner[(*grid, 1, 1)](*arguments, *constants)
    except Exception as error:
        raise RuntimeError(f"Triton kernel {describe(kernel, constants, options)} failed: {error}") from error


def describe(kernel: Any, constants: tuple[Any, ...], options: Options) -> str:
    names = kernel.arg_names[-len(constants) :]
    values = ", ".join(f"{name}={value}" for name, value in zip(names, constants, strict=True))
    return f"{_name(kernel)}({values}) with {options.num_warps} warps and {options.num_stages} stages"


def _name(kernel: Any) -> str:
    return str(kernel.fn.__name__)


def _specialisation(argument: Any) -> Any:
    """What Triton compiles an argument into the code for: type and alignment, and of integers 1 and multiples of 16."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return argument  # None, or a number that is compiled in
