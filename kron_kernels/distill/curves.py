"""Losses and metrics of runs over their steps, drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..testing.tables import save, subplots

Points = tuple[list[int], list[float]]
_NOT_DRAWN = ("step", "epoch", "seconds", "peak_memory_bytes")


def write_curves(log: Iterable[Mapping[str, Any]], folder: Path) -> Path | None:
    """Write ``curves.png``: the terms of the loss in one panel, each evaluation metric in its own.

    ``log`` is what the Trainer logged. None, and no file, where that holds neither.
    """
    series = read_series(log)
    losses = {name.removeprefix("loss/"): points for name, points in series.items() if name.split("/")[0] == "loss"}
    metrics = [({"": points}, name) for name, points in series.items() if name.startswith("eval/")]
    return _draw([(losses, "loss")] * bool(losses) + metrics, folder / "curves.png")


def write_overlay(panels: Mapping[str, Mapping[str, Points]], path: str | os.PathLike[str]) -> Path | None:
    """Write curves of several runs: a panel for each title, in it a line for each label; None where there is none."""
    return _draw([(lines, title) for title, lines in panels.items() if lines], Path(path))


def read_series(log: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Give steps and values by name, of every finite number that the Trainer logged."""
    series: dict[str, Points] = {}
    for record in log:
        for name, value in record.items():
            if name not in _NOT_DRAWN and isinstance(value, int | float) and math.isfinite(value) and "step" in record:
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
