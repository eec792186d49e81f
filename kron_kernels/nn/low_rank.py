"""LowRankLinear: a linear layer whose weight is a product of two thin matrices, and its fit to a dense one."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..factorize import LowRankFactors, nearest_low_rank
from .linear import fit_outputs


class LowRankLinear(nn.Module):
    """``x v^T u + bias``: nn.Linear with weight ``u^T v``, ``u (rank, out_features)``, ``v (rank, in_features)``.

    ``x`` is ``(..., in_features)``, the result ``(..., out_features)``. Raises ValueError where ``rank`` is not between
    1 and the smaller of both sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank: expected 1 to min(in, out) = {min(in_features, out_features)}, got {rank}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.u = nn.Parameter(torch.empty(rank, out_features, **factory))
        self.v = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.v.dtype

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors so that the entries of W have standard deviation ``std``, nn.Linear's by default."""
        std = 1 / math.sqrt(3 * self.in_features) if std is None else std
        for factor in (self.u, self.v):
            nn.init.normal_(factor, std=math.sqrt(std / math.sqrt(self.rank)))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.v)
        if self.bias is None:
            return hidden @ self.u
        # One pass over the result, and a gradient of u as hidden^T grad: grad^T hidden is several times slower.
        return torch.addmm(self.bias, hidden.reshape(-1, self.rank), self.u).view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """The weight (out_features, in_features), built in full; differentiable."""
        return self.u.T @ self.v

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def fit_low_rank(
    linear: nn.Linear, rank: int, input_moment: Tensor | None = None, input_mean: Tensor | None = None
) -> tuple[LowRankLinear, LowRankFactors]:
    """The low-rank layer nearest to ``linear``, and the fit with its errors.

    Moment and mean, the weighted error and the bias are those of ``fit_linear``. Raises ValueError for a rank above the
    smaller size of the weight.
    """
    factors, bias = fit_outputs(linear, partial(nearest_low_rank, rank=rank), input_moment, input_mean)
    layer = nn.utils.skip_init(
        LowRankLinear,
        linear.in_features,
        linear.out_features,
        rank,
        bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    layer.u.data.copy_(factors.u)
    layer.v.data.copy_(factors.v)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer.train(linear.training), factors
