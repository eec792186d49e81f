"""KronLinear, and its fit to a dense layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..factorize import KronFactors, LowRankFactors, mean_corrected_bias, nearest_kronecker, order_cost
from ..ops import kron_matmul
from ..ops.checks import activation_code
from ..schemas.reference import kron_weight
from .factored import KronFactored, Shape, Shapes, check_product_shape, empty_factors

_Factors = TypeVar("_Factors", KronFactors, LowRankFactors)

# From so many tokens on, the dense product saves more than building its weight takes.
_MANY_TOKENS = 512
# The share of the dense multiply-adds from which on nothing is saved: the dense product runs at a higher rate.
_NO_SAVING = 0.9
# Dtypes whose dense product on the CPU runs at that rate.
DENSE_DTYPES = (torch.float32, torch.float64)


class KronLinear(KronFactored):
    """``activation(x (sum_s A_s (x) B_s)^T + bias)``: nn.Linear with a Kronecker-factored weight.

    ``x`` is ``(..., in_features)``, the result ``(..., out_features)``; ``shapes`` is ``((m1, n1), (m2, n2))`` with
    ``m1 * m2 == out_features`` and ``n1 * n2 == in_features``. ``activation`` is None, "gelu" (erf), "gelu_tanh",
    "relu" or "silu", applied after the bias. Raises ValueError where shapes, terms or activation do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shapes: Shapes,
        terms: int = 1,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_product_shape(shapes, out_features, in_features)
        activation_code(activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(*empty_factors(shapes, terms, factory))
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw the factors so that the entries of W have standard deviation ``std``.

        The default is nn.Linear's, ``1 / sqrt(3 * in_features)``: with inputs of unit variance the outputs then have
        variance ``in_features * S * var(a) * var(b) = 1/3``, as those of nn.Linear, where
        ``var(a) = var(b) = std / sqrt(S)``. The bias is uniform in ``+-1 / sqrt(in_features)``.
        """
        self.init_factors(1 / math.sqrt(3 * self.in_features) if std is None else std)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``a``, ``b`` and ``bias`` as they are now."""
        parameters = self._parameters  # nn.Module's attribute look-up costs as much as a small op
        a, b = parameters.get("a"), parameters.get("b")
        if a is None or b is None:  # stored as integers, made by a parametrization, or set as plain tensors
            return self.a, self.b, self.bias
        return a, b, parameters.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        return kron_linear(x, *self.operands(), activation=self.activation)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        a_shape: Shape,
        terms: int = 1,
        input_moment: Tensor | None = None,
        input_mean: Tensor | None = None,
    ) -> KronLinear:
        """The nearest Kronecker layer to ``linear`` with A of shape ``a_shape`` (see ``fit_linear``)."""
        return fit_linear(linear, a_shape, terms, input_moment, input_mean)[0]

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same; ValueError where an activation is part of this one."""
        if self.activation is not None:
            raise ValueError(f"activation: expected None for a plain nn.Linear, got {self.activation!r}")
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.a.device,
            dtype=self.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.factor_repr()}{activation}"
        )


def kron_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """``kron_matmul`` with factors ``(S, ...)``, or for many tokens the dense product where that takes no more work.

    Several terms of large factors, TQCompressor's for instance, have as many multiply-adds as their sum has. For many
    tokens, on the CPU in float32 or float64, the weight is then built and multiplied whole. It and its gradient take
    memory as in a dense layer. Few tokens read the factors alone.
    """
    if a.shape[0] > 1 and takes_dense_product(x, a, b, activation):
        return F.linear(x, kron_weight(a, b), bias)
    return kron_matmul(x, a, b, bias, activation=activation)


def takes_dense_product(x: Tensor, a: Tensor, b: Tensor, activation: str | None) -> bool:
    """Tell whether ``kron_linear`` multiplies these operands by the dense weight."""
    if not _many_tokens(x):
        return False
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    fits = x.shape[-1] == n1 * n2 and x.dtype is a.dtype  # kron_matmul names what does not
    return fits and takes_dense_products(((m1, n1), (m2, n2)), terms, activation)


def takes_dense_products(shapes: Shapes, terms: int, activation: str | None) -> bool:
    """Tell whether a layer multiplies many tokens by its dense weight: its terms together save nothing."""
    (m1, n1), (m2, n2) = shapes
    if terms == 1 or activation is not None:
        return False
    return min(order_cost(m1, n1, m2, n2, terms)) >= _NO_SAVING * m1 * m2 * n1 * n2


def _many_tokens(x: Tensor) -> bool:
    # A captured graph should not depend on the number of tokens, and autocast computes in another dtype.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not isinstance(x, Tensor) or not x.is_cpu or x.dtype not in DENSE_DTYPES:
        return False
    return x.numel() >= _MANY_TOKENS * x.shape[-1]


def fit_linear(
    linear: nn.Linear,
    a_shape: Shape,
    terms: int = 1,
    input_moment: Tensor | None = None,
    input_mean: Tensor | None = None,
) -> tuple[KronLinear, KronFactors]:
    """The nearest Kronecker layer to ``linear``, and the fit with its errors.

    ``input_moment (in_features, in_features)``, E[x x^T] of the inputs, makes the fit data-aware (see
    ``nearest_kronecker``). ``input_mean (in_features,)`` moves the mean error of the outputs into the bias, if there is
    one: ``bias + (W - sum_s A_s (x) B_s) mean``. Given both, only deviations from the mean are left for the factors to
    fit. ``weighted_error`` is then the output error with that bias, still relative to the dense product ``W x``.
    Device, dtype and training mode come from ``linear``. Raises ValueError where ``a_shape`` does not divide.
    """
    nearest = partial(nearest_kronecker, a_shape=a_shape, terms=terms)
    factors, bias = fit_outputs(linear, nearest, input_moment, input_mean)
    layer = nn.utils.skip_init(
        KronLinear,
        linear.in_features,
        linear.out_features,
        (tuple(factors.a.shape[1:]), tuple(factors.b.shape[1:])),
        terms,
        bias=bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    layer.load_factors(factors.a, factors.b)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer.train(linear.training), factors


def fit_outputs(
    linear: nn.Linear, nearest: Callable[..., _Factors], input_moment: Tensor | None, input_mean: Tensor | None
) -> tuple[_Factors, Tensor | None]:
    """Fit factors to a dense layer; return them with their errors, and the layer's new bias (None without one).

    ``nearest(weight, input_moment=C)`` makes the factors; the other arguments are those of ``fit_linear``.
    """
    weight = linear.weight.detach()
    if linear.bias is None or input_mean is None:
        factors = nearest(weight, input_moment=input_moment)
        return factors, None if linear.bias is None else linear.bias.detach()
    centred = None if input_moment is None else covariance(input_moment, input_mean)
    factors = nearest(weight, input_moment=centred)
    if input_moment is not None and centred is not None:
        share = (_output_energy(weight, centred) / _output_energy(weight, input_moment)) ** 0.5
        factors = replace(factors, weighted_error=cast(float, factors.weighted_error) * share)
    return factors, mean_corrected_bias(weight, factors, linear.bias.detach(), input_mean)


def covariance(moment: Tensor, mean: Tensor) -> Tensor:
    """Return E[x x^T] - E[x] E[x]^T (n, n), fp64, kept positive semi-definite where the mean is all but everything."""
    centred = moment.double() - torch.outer(mean.double(), mean.double())
    centred.diagonal().add_(1e-6 * moment.double().diagonal().mean())
    return centred


def _output_energy(weight: Tensor, moment: Tensor) -> float:
    """E[|W x|^2] of inputs with this moment."""
    weight, moment = weight.float(), moment.to(weight.device, torch.float32)
    return float(((weight @ moment) * weight).sum())
