"""Factors of a weight: the nearest ones, those that keep a layer's output, and the shapes worth having."""

from .low_rank import LowRankFactors, nearest_low_rank
from .model_shapes import BertSize, ModelShapes, model_shapes, search_model_shapes
from .nearest import KronFactors, mean_corrected_bias, nearest_kronecker
from .shapes import FactorShape, factor_shape, order_cost

__all__ = [
    "BertSize",
    "FactorShape",
    "KronFactors",
    "LowRankFactors",
    "ModelShapes",
    "factor_shape",
    "mean_corrected_bias",
    "model_shapes",
    "nearest_kronecker",
    "nearest_low_rank",
    "order_cost",
    "search_model_shapes",
]
