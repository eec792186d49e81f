"""Kronecker factors of a weight: the nearest ones, those that keep a layer's output, and the shapes worth having."""

from .model_shapes import BertSize, ModelShapes, model_shapes, search_model_shapes
from .nearest import KronFactors, mean_corrected_bias, nearest_kronecker
from .shapes import FactorShape, factor_shape, order_cost

__all__ = [
    "BertSize",
    "FactorShape",
    "KronFactors",
    "ModelShapes",
    "factor_shape",
    "mean_corrected_bias",
    "model_shapes",
    "nearest_kronecker",
    "order_cost",
    "search_model_shapes",
]
