"""Hooks that sum x x^T and x over a module's inputs, once for all modules that are fed the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Rows of an input cast to float32 at a time.
_CHUNK_ROWS = 16384


@dataclass
class InputStatistics:
    """Moment (n, n) and mean (n,) of one input, over ``tokens`` rows."""

    moment: Tensor
    mean: Tensor
    tokens: int


class _Sums:
    """Running sums of one input that the modules ``names`` share."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.added: set[int] = set()
        self.tokens = 0
        self._outer = self._total = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        n = rows.shape[1]
        if self.tokens == 0:
            self._outer = torch.zeros(n, n, dtype=torch.float32, device=rows.device)
            self._total = torch.zeros(n, dtype=torch.float64, device=rows.device)
        elif n != self._total.shape[0]:
            raise ValueError(f"modules: {self.names[0]} takes inputs {self._total.shape[0]} wide and {n} wide")
        for chunk in rows.split(_CHUNK_ROWS):
            chunk = chunk.float()
            # In place: autocast, where the caller has it on, leaves that in full precision.
            self._outer.addmm_(chunk.T, chunk)
            self._total += chunk.sum(0, dtype=torch.float64)
        self.tokens += rows.shape[0]

    def statistics(self) -> InputStatistics:
        if self.tokens == 0:
            raise ValueError(f"batches: attention_mask leaves no token for {self.names[0]}")
        if not (torch.isfinite(self._total).all() and torch.isfinite(self._outer).all()):
            raise ValueError(f"batches: the inputs of {self.names[0]} hold NaN or inf")
        moment = self._outer.div_(self.tokens)
        return InputStatistics(moment, (self._total / self.tokens).to(moment.dtype), self.tokens)


class InputRecorder:
    """Finds, in its first pass, which modules are fed the same tensors, and sums inputs in the passes after it."""

    def __init__(self) -> None:
        self.groups: dict[str, _Sums] = {}
        self._probing = True
        self._mask: Tensor | None = None
        # Tensors seen in this pass, by id: the weak reference tells each from a later one at its address.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._count = 0
        self._calls: dict[str, list[int]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None or not x.is_floating_point() or x.ndim == 0:
                got = "no tensor" if x is None else f"{x.dtype} of shape {tuple(x.shape)}"
                raise ValueError(f"modules: {name} must take floating-point rows (..., n), got {got}")
            serial = self._serial(x)
            self._calls.setdefault(name, []).append(serial)
            if self._probing:
                return
            group = self.groups.setdefault(name, _Sums([name]))
            # Each member of a group comes with the same tensor: the first one adds it for all.
            if serial not in group.added:
                group.added.add(serial)
                group.add(self._tokens(x))

        return record

    def begin(self, mask: Tensor | None) -> None:
        """Start a forward pass."""
        self._mask, self._count = mask, 0
        self._seen.clear()
        self._calls = {}
        for group in self.groups.values():
            group.added.clear()

    def end(self) -> None:
        """End a forward pass: the first makes the groups, the others are checked against them."""
        if self._probing:
            by_inputs: dict[tuple[int, ...], list[str]] = {}
            for name, serials in self._calls.items():
                by_inputs.setdefault(tuple(serials), []).append(name)
            for names in by_inputs.values():
                self.groups.update(dict.fromkeys(names, _Sums(names)))
            self._probing = False
            return
        for name, group in self.groups.items():
            if self._calls.get(name) != self._calls.get(group.names[0]):
                raise RuntimeError(
                    f"modules: {group.names[0]} and {name} share their inputs in the first batch but not in a later "
                    "one; calibrate them apart"
                )

    def statistics(self) -> dict[str, InputStatistics]:
        done: dict[int, InputStatistics] = {}
        for group in self.groups.values():
            if id(group) not in done:
                done[id(group)] = group.statistics()
        return {name: done[id(group)] for name, group in self.groups.items()}

    def _serial(self, x: Tensor) -> int:
        """A number for this tensor with its present values, the same throughout one pass."""
        version = 0 if x.is_inference() else x._version
        known = self._seen.get(id(x))
        if known is None or known[0]() is not x or known[1] != version:
            self._count += 1
            known = self._seen[id(x)] = (weakref.ref(x), version, self._count)
        return known[2]

    def _tokens(self, x: Tensor) -> Tensor:
        """The rows (T, n) of ``x`` that the mask keeps; all of them where its shape is not that of tokens."""
        rows = x.reshape(-1, x.shape[-1])
        if self._mask is None or x.shape[:-1] not in (self._mask.shape, (self._mask.numel(),)):
            return rows
        return rows[self._mask.flatten()]
