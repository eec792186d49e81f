"""Replace a model's layers by factored ones: presets, calibration, conversion, int8 and int4 storage, counting."""

from .agreement import hidden_agreement
from .calibrate import Calibration, calibrate
from .kronify import ConversionReport, LayerReport, kronified_copy, kronify_
from .presets import KronConfig, as_kron_config, preset
from .quantize import QuantizationReport, quantize_
from .rules import BandRule, LowRankRule, Rule, ShapeRule

__all__ = [
    "BandRule",
    "Calibration",
    "ConversionReport",
    "KronConfig",
    "LayerReport",
    "LowRankRule",
    "QuantizationReport",
    "Rule",
    "ShapeRule",
    "as_kron_config",
    "calibrate",
    "hidden_agreement",
    "kronified_copy",
    "kronify_",
    "preset",
    "quantize_",
]
