"""One dense layer into the factored one that its rule asks for: checked, freshly drawn or fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..nn import (
    AdaptiveEmbedding,
    KronEmbedding,
    KronLinear,
    LowRankLinear,
    Shapes,
    fit_adaptive,
    fit_embedding,
    fit_linear,
    fit_low_rank,
)
from .calibrate import Calibration
from .conv1d import Conv1DLike, as_linear, weight_shape
from .rules import BandRule, LowRankRule, Rule, ShapeRule

Factored = KronLinear | KronEmbedding | LowRankLinear | AdaptiveEmbedding
LINEARS = (KronLinear, LowRankLinear)
EMBEDDINGS = (KronEmbedding, AdaptiveEmbedding)
FACTORED = (*LINEARS, *EMBEDDINGS)


@dataclass(frozen=True)
class Target:
    """A dense layer to replace: its name in the model, its role and its rule."""

    name: str
    role: str
    module: nn.Linear | Conv1DLike | nn.Embedding
    rule: Rule

    @property
    def shapes(self) -> Shapes:
        """The shapes of a pair's factors, ((m1, n1), (m2, n2))."""
        assert isinstance(self.rule, ShapeRule)
        return self.rule.resolve(*weight_shape(self.module))

    @property
    def terms(self) -> int:
        """The number of a pair's terms."""
        assert isinstance(self.rule, ShapeRule)
        return self.rule.terms

    @property
    def bands(self) -> tuple[tuple[int, int], ...]:
        """(tokens, rank) of every band of an embedding."""
        rows = weight_shape(self.module)[0]
        if isinstance(self.rule, LowRankRule):
            return ((rows, self.rule.rank),)
        assert isinstance(self.rule, BandRule)
        return self.rule.resolve(rows)

    def structure(self) -> str:
        """Say what the layer becomes: "48x384 (x) 2x16", "rank 28", "bands 2000x192, 28522x24"."""
        if isinstance(self.rule, ShapeRule):
            (m1, n1), (m2, n2) = self.shapes
            pair = f"{m1}x{n1} (x) {m2}x{n2}"
            return pair if self.terms == 1 else f"{self.terms} of {pair}"
        if isinstance(self.module, nn.Embedding):
            return "bands " + ", ".join(f"{tokens}x{rank}" for tokens, rank in self.bands)
        return str(self.rule)

    def check(self) -> None:
        """Raise ValueError where the rule does not fit the layer."""
        rows, cols = weight_shape(self.module)
        embeds = isinstance(self.module, nn.Embedding)
        if isinstance(self.rule, ShapeRule):
            (m1, n1), (m2, n2) = self.shapes
            if embeds and m2 != 1:
                raise ValueError(f"b: expected a row vector (1, k) for an embedding, got {m2}x{n2}")
            if self.terms > min(m1 * n1, m2 * n2):
                most = min(m1 * n1, m2 * n2)
                raise ValueError(f"terms: expected at most min(m1*n1, m2*n2) = {most}, got {self.terms}")
        elif isinstance(self.rule, BandRule) and not embeds:
            raise ValueError("bands: expected an embedding, got a linear layer; give it a rank or a factor's shape")
        else:
            ranks = [rank for _, rank in self.bands] if embeds else [self.rule.rank]  # type: ignore[union-attr]
            if max(ranks) > min(rows, cols):
                raise ValueError(f"rank: expected at most {min(rows, cols)}, got {max(ranks)}")


def fresh_layer(target: Target) -> Factored:
    """Make the layer of a target with freshly drawn factors."""
    module = target.module
    factory: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Embedding):
        size = module.num_embeddings, module.embedding_dim
        if isinstance(target.rule, ShapeRule):
            return KronEmbedding(*size, target.shapes[1][1], target.terms, module.padding_idx, **factory)
        return AdaptiveEmbedding(*size, target.bands, module.padding_idx, **factory)
    (rows, cols), bias = weight_shape(module), module.bias is not None
    if isinstance(target.rule, ShapeRule):
        return KronLinear(cols, rows, target.shapes, target.terms, bias, **factory)
    return LowRankLinear(cols, rows, target.rule.rank, bias, **factory)  # type: ignore[union-attr]


def fitted_layer(target: Target, calibration: Calibration | None) -> tuple[Factored, float, float | None]:
    """Make the layer of a target fitted to the dense one; return it with its relative and its output error."""
    if isinstance(target.module, nn.Embedding):
        counts = None if calibration is None else calibration.token_counts
        if isinstance(target.rule, ShapeRule):
            embedding, nearest = fit_embedding(target.module, target.shapes[1][1], target.terms)
            return embedding, nearest.relative_error, None
        adaptive, error = fit_adaptive(target.module, target.bands, counts)
        return adaptive, error, None
    moment: Tensor | None = None if calibration is None else calibration[target.name]
    mean: Tensor | None = None if calibration is None else calibration.input_mean[target.name]
    linear = as_linear(target.module)
    if isinstance(target.rule, ShapeRule):
        pair, factors = fit_linear(linear, target.shapes[0], target.terms, moment, mean)
        return pair, factors.relative_error, factors.weighted_error
    thin, low = fit_low_rank(linear, target.rule.rank, moment, mean)  # type: ignore[union-attr]
    return thin, low.relative_error, low.weighted_error
