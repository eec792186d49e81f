"""Kronecker factors of a weight: the nearest ones, those that keep a layer's output, and the shapes worth having."""

from .nearest import KronFactors, mean_corrected_bias, nearest_kronecker

__all__ = ["KronFactors", "mean_corrected_bias", "nearest_kronecker"]
