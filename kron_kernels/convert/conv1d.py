"""transformers' Conv1D, the linear layer of GPT-2: recognised by its name, without importing transformers."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn


class Conv1DLike(nn.Module):
    """The part of a Conv1D that is used: ``x @ weight + bias`` with ``weight (nx, nf)`` and ``bias (nf,)``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    nx: int
    nf: int


def is_conv1d(module: nn.Module) -> TypeGuard[Conv1DLike]:
    """Tell whether ``module`` is a transformers Conv1D."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def as_linear(module: nn.Linear | Conv1DLike) -> nn.Linear:
    """Return ``module`` itself, or an nn.Linear that computes as a Conv1D, with a copy (nf, nx) of its weight."""
    if isinstance(module, nn.Linear):
        return module
    linear: Any = nn.Linear(module.nx, module.nf, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), module.weight.requires_grad)
    linear.bias = module.bias
    return linear.train(module.training)


def weight_shape(module: nn.Linear | nn.Embedding | Conv1DLike) -> tuple[int, int]:
    """Return (out, in) of a linear layer's weight, (rows, width) of an embedding's."""
    weight: Tensor = module.weight
    rows, cols = weight.shape
    return (cols, rows) if is_conv1d(module) else (rows, cols)
