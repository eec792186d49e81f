"""Modules with Kronecker-factored weights: drop-in for nn.Linear and nn.Embedding, and the decoder tied to the latter.

A weight is ``W = sum_s A_s (x) B_s`` with ``a (S, m1, n1)`` and ``b (S, m2, n2)``; it is never built in ``forward``.
The state dict of every module holds ``a``, ``b`` and, where there is one, ``bias``.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import activation_code
from .factorize import KronFactors, mean_corrected_bias, nearest_kronecker
from .functional import kron_matmul
from .reference import kron_weight

Shape = tuple[int, int]
Shapes = tuple[Shape, Shape]


class _KronFactored(nn.Module):
    """The factors ``a (S, m1, n1)`` and ``b (S, m2, n2)`` of a weight, and what all modules do with them."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, shapes: Shapes, terms: int, factory: dict[str, Any]) -> None:
        super().__init__()
        if isinstance(terms, bool) or not isinstance(terms, int) or terms < 1:
            raise ValueError(f"terms: expected an integer of at least 1, got {terms!r}")
        a_shape, b_shape = shapes
        self.a = nn.Parameter(torch.empty(terms, *a_shape, **factory))
        self.b = nn.Parameter(torch.empty(terms, *b_shape, **factory))

    @property
    def terms(self) -> int:
        return self.a.shape[0]

    @property
    def shapes(self) -> Shapes:
        """((m1, n1), (m2, n2))."""
        (_, m1, n1), (_, m2, n2) = self.a.shape, self.b.shape
        return (m1, n1), (m2, n2)

    def dense_weight(self) -> Tensor:
        """The weight (m1 * m2, n1 * n2), built in full; differentiable."""
        return kron_weight(self.a, self.b)

    def _init_factors(self, std: float) -> None:
        # An entry of W sums S products of two independent entries: its variance is S * var(a) * var(b). Both factors
        # get the same share.
        factor_std = math.sqrt(std / math.sqrt(self.terms))
        nn.init.normal_(self.a, std=factor_std)
        nn.init.normal_(self.b, std=factor_std)

    def _load_factors(self, a: Tensor, b: Tensor) -> None:
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)

    def _factor_repr(self) -> str:
        (m1, n1), (m2, n2) = self.shapes
        compression = m1 * m2 * n1 * n2 / (self.a.numel() + self.b.numel())
        return f"factors={m1}x{n1} (x) {m2}x{n2}, terms={self.terms}, compression={compression:.2f}x"


class KronLinear(_KronFactored):
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
        (m1, n1), (m2, n2) = shapes
        if (m1 * m2, n1 * n2) != (out_features, in_features):
            raise ValueError(
                f"shapes: expected a product of shape (out_features, in_features) = ({out_features}, {in_features}), "
                f"got {m1}x{n1} (x) {m2}x{n2} of shape ({m1 * m2}, {n1 * n2})"
            )
        activation_code(activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(shapes, terms, factory)
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
        self._init_factors(1 / math.sqrt(3 * self.in_features) if std is None else std)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return kron_matmul(x, self.a, self.b, self.bias, activation=self.activation)

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
            dtype=self.a.dtype,
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
            f"{self._factor_repr()}{activation}"
        )


class KronEmbedding(_KronFactored):
    """nn.Embedding whose table is ``sum_s A_s (x) B_s`` with a row vector B: row i is ``sum_s A_s[i] (x) B_s``.

    ``a`` is ``(S, num_embeddings, embedding_dim / factor)`` and ``b`` ``(S, 1, factor)``, so a look-up gathers
    ``embedding_dim / factor`` values and expands them; the table is never built. ``padding_idx`` means what it means
    in nn.Embedding: its row starts at zero and looking it up gives no gradient. An index out of range raises
    IndexError. Raises ValueError where ``factor`` does not divide ``embedding_dim`` or ``padding_idx`` is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        factor: int,
        terms: int = 1,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if factor < 1 or embedding_dim % factor:
            raise ValueError(f"factor: expected a divisor of embedding_dim = {embedding_dim}, got {factor}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected an index into {num_embeddings} embeddings, got {padding_idx}")
        shapes = ((num_embeddings, embedding_dim // factor), (1, factor))
        super().__init__(shapes, terms, {"device": device, "dtype": dtype})
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings
        self.reset_parameters()

    @property
    def num_embeddings(self) -> int:
        return self.a.shape[1]

    def reset_parameters(self, std: float = 1.0) -> None:
        """Draw the factors so that the table's entries have standard deviation ``std`` (nn.Embedding's is 1)."""
        self._init_factors(std)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.a[:, self.padding_idx].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        # (..., p, 1) * (1, k) -> (..., p * k)
        rows = (F.embedding(ids, a).unsqueeze(-1) * b for a, b in zip(self.a, self.b, strict=True))
        out = reduce(torch.add, rows).flatten(-2)
        if self.padding_idx is None or not torch.is_grad_enabled():
            return out
        return torch.where((ids == self.padding_idx).unsqueeze(-1), out.detach(), out)

    def decode(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits ``hidden @ table^T + bias`` (..., num_embeddings) of ``hidden (..., embedding_dim)``."""
        return kron_matmul(hidden, self.a, self.b, bias)

    def tied_decoder(self, bias: nn.Parameter | None = None) -> KronDecoder:
        """An output layer that shares this embedding's factors."""
        return KronDecoder(self.a, self.b, bias)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, factor: int, terms: int = 1) -> KronEmbedding:
        """The nearest Kronecker embedding to ``embedding`` (see ``fit_embedding``)."""
        return fit_embedding(embedding, factor, terms)[0]

    def to_embedding(self) -> nn.Embedding:
        """The dense embedding with the same table."""
        table = self.dense_weight().detach()
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=self.padding_idx).train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._factor_repr()}"


class KronDecoder(_KronFactored):
    """Output layer over the vocabulary, ``hidden (A (x) B)^T + bias``, on factors shared with a KronEmbedding.

    ``a (S, V, d/k)`` and ``b (S, 1, k)`` are kept as they come, so that parameters stay tied.
    """

    def __init__(self, a: nn.Parameter, b: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.a, self.b, self.bias = a, b, bias

    def forward(self, hidden: Tensor) -> Tensor:
        return kron_matmul(hidden, self.a, self.b, self.bias)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, {self._factor_repr()}"


def fit_linear(
    linear: nn.Linear,
    a_shape: Shape,
    terms: int = 1,
    input_moment: Tensor | None = None,
    input_mean: Tensor | None = None,
) -> tuple[KronLinear, KronFactors]:
    """The nearest Kronecker layer to ``linear``, and the fit with its errors.

    ``input_moment (in_features, in_features)`` makes the fit data-aware (see ``nearest_kronecker``). ``input_mean
    (in_features,)`` moves the mean error of the outputs into the bias: ``bias + (W - sum_s A_s (x) B_s) mean``.
    Device, dtype, training mode and the bias come from ``linear``. Raises ValueError where ``a_shape`` does not divide.
    """
    weight = linear.weight.detach()
    factors = nearest_kronecker(weight, a_shape, terms, input_moment=input_moment)
    layer = nn.utils.skip_init(
        KronLinear,
        linear.in_features,
        linear.out_features,
        (tuple(factors.a.shape[1:]), tuple(factors.b.shape[1:])),
        terms,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer._load_factors(factors.a, factors.b)
    if linear.bias is not None:
        bias = linear.bias.detach()
        with torch.no_grad():
            layer.bias.copy_(bias if input_mean is None else mean_corrected_bias(weight, factors, bias, input_mean))
    return layer.train(linear.training), factors


def fit_embedding(embedding: nn.Embedding, factor: int, terms: int = 1) -> tuple[KronEmbedding, KronFactors]:
    """The nearest Kronecker embedding to ``embedding``, and the fit with its error.

    Raises ValueError for an embedding that renormalises (``max_norm``) or treats gradients in its own way
    (``scale_grad_by_freq``, ``sparse``), and where ``factor`` does not divide its width.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise ValueError("embedding: expected one without max_norm, scale_grad_by_freq and sparse")
    weight = embedding.weight.detach()
    rows, dim = weight.shape
    if factor < 1 or dim % factor:
        raise ValueError(f"factor: expected a divisor of embedding_dim = {dim}, got {factor}")
    factors = nearest_kronecker(weight, (rows, dim // factor), terms)
    layer = KronEmbedding(rows, dim, factor, terms, embedding.padding_idx, device=weight.device, dtype=weight.dtype)
    layer._load_factors(factors.a, factors.b)
    return layer.train(embedding.training), factors
