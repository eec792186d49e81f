"""The one rule for numerical errors: against fp64 at most twice the error of torch in the same dtype."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..schemas import reference
from .shapes import Case, Operands, make


def forward_oracle(operands: Operands, activation: str | None = None) -> Tensor:
    """Output through the dense weight in fp64."""
    o = operands.double()
    y = torch.nn.functional.linear(o.x, reference.kron_weight(o.a, o.b), o.bias)
    return y if activation is None else reference.ACTIVATIONS[activation](y)


def backward_oracle(operands: Operands) -> tuple[Tensor, ...]:
    """``(dx, da, db, dbias)`` through the dense weight and autograd in fp64."""
    o = operands.double()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (o.x, o.a, o.b)]
    x, a, b = leaves
    dx, da, db = torch.autograd.grad(x @ reference.kron_weight(a, b).T, leaves, o.grad)
    return dx, da, db, o.grad.sum(0)


@functools.cache
def forward_case(case: Case, dtype: torch.dtype, activation: str | None = None) -> tuple[Operands, Tensor, Tensor]:
    """Operands, output of torch in the same dtype, and oracle of a case; made once for all tests of a run."""
    o = make(case, dtype)
    return o, reference.kron_matmul(o.x, o.a, o.b, o.bias, activation), forward_oracle(o, activation)


@functools.cache
def backward_case(case: Case, dtype: torch.dtype) -> tuple[Operands, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Operands, gradients of torch in the same dtype, and oracles of a case."""
    o = make(case, dtype)
    return o, reference.kron_matmul_backward(o.grad, o.x, o.a, o.b), backward_oracle(o)


def assert_accurate(actual: Tensor, same_dtype: Tensor, oracle: Tensor, what: str = "output") -> None:
    """The error rule: against fp64 at most twice the error of torch in the same dtype, as maximum and relative RMS.

    Errors of few values differ by luck (a gradient of a 2 x 2 factor has four of them, each the sum of thousands of
    products): the factor is 2 for many values, 2.5 for 64, 4 for 4. One unit in the last place of the largest value is
    always allowed; in float64, where the oracle errs as much as what it judges, 64.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if actual.numel() == 0:
        return
    units = 64 if same_dtype.dtype is torch.float64 else 1
    factor = 2 * (1 + 2 / oracle.numel() ** 0.5)
    floor = units * torch.finfo(same_dtype.dtype).eps * oracle.abs().max().item()
    for name, norm in (("maximum", _max), ("RMS", _rms)):
        error, allowed = norm(actual.double() - oracle), factor * norm(same_dtype.double() - oracle) + floor
        assert error <= allowed, f"{what}: {name} error {error:.3e}, allowed {allowed:.3e}"


def _max(error: Tensor) -> float:
    return error.abs().max().item()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()
