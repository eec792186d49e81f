"""Losses and metrics of runs over their steps, drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..testing.tables import save, subplots
from .run_folder import RunFolder

Points = tuple[list[int], list[float]]
# How fast an evaluation ran says nothing of the model.
_COSTS = ("runtime", "per_second", "jit_compilation_time", "model_preparation_time")


def write_curves(run: RunFolder) -> Path | None:
    """Write ``curves.png``: the terms of the loss in one panel, each evaluation metric in its own.

    None, and no file, where nothing was logged so far.
    """
    series = read_series(run)
    losses = {name: points for name, points in series.items() if name == "loss" or name.startswith("loss/")}
    metrics = {
        name: points for name, points in series.items() if name.startswith("eval/") and not name.endswith(_COSTS)
    }
    panels = [({name.removeprefix("loss/"): points for name, points in losses.items()}, "loss")] if losses else []
    panels += [({"": points}, name) for name, points in metrics.items()]
    return _draw(panels, run.path / "curves.png")


def write_overlay(panels: Mapping[str, Mapping[str, Points]], path: str | os.PathLike[str]) -> Path | None:
    """Write curves of several runs: a panel for each title, in it a line for each label; None where there is none."""
    return _draw([(lines, title) for title, lines in panels.items() if lines], Path(path))


def read_series(run: RunFolder) -> dict[str, Points]:
    """Name -> steps and values, of everything finite that the run logged."""
    series: dict[str, Points] = {}
    for record in run.metrics():
        for name, value in record.items():
            if name not in ("step", "epoch", "seconds") and isinstance(value, int | float) and "step" in record:
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return series


def _draw(panels: Sequence[tuple[Mapping[str, Points], str]], path: Path) -> Path | None:
    if not panels:
        return None
    figure, axes = subplots(len(panels), 3, (4.2, 3.0))
    for panel, (lines, title) in zip(axes, panels, strict=True):
        _draw_panel(panel, lines, title)
    save(figure, path)
    return path


def _draw_panel(panel: Any, lines: Mapping[str, Points], title: str) -> None:
    for label, (steps, values) in lines.items():
        # A line of one point would not be seen.
        panel.plot(steps, values, "o-" if len(steps) < 20 else "-", markersize=3, linewidth=1, label=label or None)
    drawn = [value for _, values in lines.values() for value in values]
    # The terms of the loss differ by orders of magnitude; a metric does not.
    if any(lines) and min(drawn, default=0.0) > 0 and math.log10(max(drawn) / min(drawn)) > 1:
        panel.set_yscale("log")
    if any(lines):
        panel.legend(frameon=False, fontsize=7)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_title(title, fontsize=9)
    panel.set_xlabel("step", fontsize=9)
    panel.grid(True, linewidth=0.3)
    panel.spines[["top", "right"]].set_visible(False)
