"""From a dense checkpoint to a compressed one: factorise, calibrate, train block by block, save."""

from .blockwise import BlockReport, WarmStartReport, warm_start
from .pipeline import CompressReport, compress
from .starts import WARM_STARTS, linear_names, start_model

__all__ = [
    "WARM_STARTS",
    "BlockReport",
    "CompressReport",
    "WarmStartReport",
    "compress",
    "linear_names",
    "start_model",
    "warm_start",
]
