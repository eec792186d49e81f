"""The methods to start a compressed encoder, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..convert.calibrate import Calibration, Progress, calibrate
from ..convert.presets import KronConfig
from ..models import KronBertPreTrainedModel
from .blockwise import Batch, WarmStartReport, warm_start

# Factors nearest to the weights; nearest to what the layers put out on text; trained on it block by block from there.
WARM_STARTS = ("plain", "data-aware", "blockwise")


def start_model(
    kind: type[KronBertPreTrainedModel],
    dense: Any,
    config: KronConfig,
    batches: Sequence[Batch],
    *,
    method: str = "blockwise",
    steps: int = 300,
    seed: int = 0,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Calibration | None, WarmStartReport | None]:
    """Make a ``kind`` from ``dense`` by a method of ``WARM_STARTS``, the moments of its fit and its training's report.

    "plain" is ``kind.from_dense``; "data-aware" gives it the moments of the layers' inputs on ``batches`` (those of
    ``warm_start``), or a ``calibration`` that was made before; "blockwise" then trains it on the batches, ``steps``
    steps a block. ``dense`` stays as it is. Raises ValueError for another method, and what ``from_dense``,
    ``calibrate`` and ``warm_start`` raise.
    """
    if method not in WARM_STARTS:
        raise ValueError(f"method: expected one of {', '.join(WARM_STARTS)}, got {method!r}")
    if method == "plain":
        return kind.from_dense(dense, config, progress=progress), None, None
    calibration = calibration or calibrate(dense, batches, linear_names(dense, config), progress)
    model = kind.from_dense(dense, config, calibration=calibration, progress=progress)
    if method == "data-aware":
        return model, calibration, None
    return model, calibration, warm_start(dense, model, batches, steps=steps, seed=seed, progress=progress)


def linear_names(model: nn.Module, config: KronConfig) -> list[str]:
    """List the linear layers of a dense ``model`` that ``config`` replaces: those to calibrate."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and config.role_of(name) in config.rules and not config.skips(name)
    ]
