"""What is measured: a computation on given inputs, and candidates that do it, each with weights in its own form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Largest ||y - y64|| / ||y64|| a way may show; the same bound holds for each gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Candidate:
    """A way to compute: ``function(x, *operands)`` with ``operands = prepare(weights, tokens)``.

    ``differentiates`` says of each operand what it is ("a", "b", "bias", "weight" of a layer), in order; None: forward
    only.
    """

    name: str
    function: Callable[..., Tensor]
    prepare: Callable[[Any, int], tuple[Tensor, ...]]
    differentiates: tuple[str, ...] | None
    rest_seconds: float = 0.0


class Problem:
    """Inputs of one measurement: ``x (tokens, n)`` and independent sets of weights that take turns.

    One set keeps the weights in cache; twelve are what an encoder of twelve layers does to it. Subclasses say in
    ``reference`` what is right.
    """

    x: Tensor
    grad: Tensor
    weights: Sequence[Any]
    tokens: int
    dtype: torch.dtype
    backward: bool

    def reference(self) -> Mapping[str, Tensor]:
        """In float64: "y" and, for a backward problem, the gradients by the names of ``Candidate.differentiates``."""
        raise NotImplementedError

    @cached_property
    def _want(self) -> Mapping[str, Tensor]:
        return self.reference()

    def refusal(self, candidate: Candidate) -> str:
        """Why the candidate cannot do this at all, "" where it can."""
        return "forward only" if self.backward and candidate.differentiates is None else ""

    def tolerance(self, _candidate: Candidate) -> float:
        """The largest error of a right result."""
        return TOLERANCE[self.dtype]

    def error(self, candidate: Candidate) -> float:
        """Largest relative error ``||got - want|| / ||want||`` over the output and each gradient, against float64."""
        operands = candidate.prepare(self.weights[0], self.tokens)
        if not self.backward:
            with torch.inference_mode():
                got = {"y": candidate.function(self.x, *operands)}
        else:
            leaves = [tensor.detach().requires_grad_() for tensor in (self.x, *operands)]
            y = candidate.function(*leaves)
            names = ("y", "x", *(candidate.differentiates or ()))
            got = dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, self.grad)), strict=True))
        errors = [relative_error(got[name], self._want[name]) for name in got if name in self._want]
        # max() would let a NaN through.
        return max(errors) if all(error == error for error in errors) else float("nan")

    def runner(self, candidate: Candidate) -> Callable[[], object]:
        """A function of no arguments that computes once, with the next copy of the weights each time."""
        turn = itertools.cycle([candidate.prepare(weights, self.tokens) for weights in self.weights])
        function, x, grad = candidate.function, self.x, self.grad
        if not self.backward:

            def forward() -> Tensor:
                with torch.inference_mode():
                    return function(x, *next(turn))

            return forward

        leaves = itertools.cycle(
            [[tensor.detach().requires_grad_() for tensor in (x, *next(turn))] for _ in range(len(self.weights))]
        )

        def forward_backward() -> tuple[Tensor, ...]:
            inputs = next(leaves)
            return torch.autograd.grad(function(*inputs), inputs, grad)

        return forward_backward


def relative_error(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in float64."""
    return float((got.double() - want).norm() / want.norm())


def random_normal(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A maker of normal tensors, ``normal(*shape, scale=1.0)``, the same ones for every problem of the same sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return normal
