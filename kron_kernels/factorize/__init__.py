"""Kronecker factors of a weight: the nearest ones, those that keep a layer's output, and the shapes worth having."""

from .model_shapes import BertSize, ModelShapes, model_shapes, search_model_shapes
from .nearest import KronFactors, mean_corrected_bias, nearest_kronecker, nearest_rows
from .shapes import FactorShape, factor_shape, order_cost, search_factor_shapes

__all__ = [
    "BertSize",
    "FactorShape",
    "KronFactors",
    "ModelShapes",
    "factor_shape",
    "mean_corrected_bias",
    "model_shapes",
    "nearest_kronecker",
    "nearest_rows",
    "order_cost",
    "search_factor_shapes",
    "search_model_shapes",
]
