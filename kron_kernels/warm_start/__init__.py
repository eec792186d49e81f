"""Starts of a compressed encoder that are closer to the dense one than the nearest factors of its weights."""

from .blockwise import BlockReport, WarmStartReport, warm_start
from .methods import WARM_STARTS, linear_names, start_model

__all__ = ["WARM_STARTS", "BlockReport", "WarmStartReport", "linear_names", "start_model", "warm_start"]
