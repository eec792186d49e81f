"""From a dense checkpoint to a compressed one: factorise, calibrate, train block by block, save."""

from .blockwise import BlockReport, WarmStartReport, warm_start
from .checkpoint import ARCHITECTURES, load_dense
from .pipeline import compress, plan_size
from .plan import Plan, Planner
from .report import CompressReport
from .starts import WARM_STARTS, linear_names, start_model
from .text import read_lines, tokenize

__all__ = [
    "ARCHITECTURES",
    "WARM_STARTS",
    "BlockReport",
    "CompressReport",
    "Plan",
    "Planner",
    "WarmStartReport",
    "compress",
    "linear_names",
    "load_dense",
    "plan_size",
    "read_lines",
    "start_model",
    "tokenize",
    "warm_start",
]
