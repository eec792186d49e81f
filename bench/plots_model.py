"""Plots of encoders: where the time goes, and latency by sequence length and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.encoder_candidates import COMPILED_DENSE, DISTIL, INT8_TORCH, INT8_TORCHAO, ORT
from bench.harness import Row, read_rows
from bench.tables import machine_of
from kron_kernels.testing.tables import save, subplots

# Line of a way in the latency plot: the models whose quickest is drawn, colour, style.
LINES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "dense": (("dense",), "#000000", "o-"),
    "dense, compiled": ((COMPILED_DENSE,), "#8d99ae", "o--"),
    "dense, int8": ((INT8_TORCH, INT8_TORCHAO), "#bc6c25", "s--"),
    "dense, ONNX Runtime": ((ORT,), "#6a994e", "s--"),
    "DistilBERT, 6 layers": ((DISTIL,), "#9d4edd", "s--"),
    "K8": (("K8",), "#2c7da0", "o-"),
    "K21": (("K21",), "#013a63", "o-"),
}
# By part, from the middle of the model outwards.
PART_COLORS = {
    "FFN": "#014f86",
    "QKV": "#2a6f97",
    "output projection": "#61a5c2",
    "attention": "#e09f3e",
    "LayerNorm": "#9e2a2b",
    "embedding": "#6a994e",
    "pooler": "#a7c957",
    "framework": "#8d99ae",
}


def plot_profile(results: Path) -> None:
    """Write profile.png: milliseconds by part, stacked, a panel an input shape; of the machine measured last."""
    rows = _of_last_machine(read_rows(results / "profile.csv"))
    if not rows:
        return
    points = list(dict.fromkeys((row["dtype"], row["batch"], row["sequence"]) for row in rows))
    figure, axes = _subplots(points)
    for panel, point in zip(axes, points, strict=False):
        mine = [row for row in rows if (row["dtype"], row["batch"], row["sequence"]) == point]
        models = list(dict.fromkeys(row["model"] for row in mine))
        heights = {(row["model"], row["part"]): float(row["time_ms"]) for row in mine}
        floor = [0.0] * len(models)
        for part, color in PART_COLORS.items():
            height = [heights.get((model, part), 0.0) for model in models]
            panel.bar(models, height, bottom=floor, color=color, label=part, width=0.7)
            floor = [low + more for low, more in zip(floor, height, strict=True)]
        for place, total in enumerate(floor):
            panel.text(place, total, f"{total:.1f}", ha="center", va="bottom", fontsize=8)
        panel.set_title(f"{point[0]}, {point[1]} x {point[2]} tokens", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    # The topmost part is named first.
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    figure.supylabel("milliseconds a forward", fontsize=9)
    _finish(figure, rows, results / "profile.png")


def plot_latency(results: Path) -> None:
    """Write latency.png: float32 and bfloat16, by sequence length at batch 1 and by batch at 128 tokens."""
    rows = _of_last_machine([row for row in read_rows(results / "model.csv") if row["time_ms_q50"]])
    panels = [
        (dtype, fixed, value, along)
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
        for fixed, value, along in (("batch", "1", "sequence"), ("sequence", "128", "batch"))
        if len({row[along] for row in rows if row["dtype"] == dtype and row[fixed] == value}) > 1
    ]
    if not panels:
        return
    figure, axes = _subplots(panels, columns=2, size=(4.6, 3.4))
    for panel, (dtype, fixed, value, along) in zip(axes, panels, strict=False):
        mine = [row for row in rows if row["dtype"] == dtype and row[fixed] == value]
        ticks = sorted({int(row[along]) for row in mine})
        for label, (models, color, style) in LINES.items():
            line = best_line([row for row in mine if row["model"] in models], along)
            if line:
                panel.plot(list(line), list(line.values()), style, color=color, label=label, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        names = {"sequence": "tokens", "batch": "sequences of 128 tokens"}
        panel.set_xlabel(names[along], fontsize=9)
        panel.set_title(f"{dtype}, {'one sequence' if along == 'sequence' else 'batches'}", fontsize=9)
        panel.grid(True, which="both", linewidth=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7)
    figure.supylabel("milliseconds a forward", fontsize=9)
    _finish(figure, rows, results / "latency.png")


def best_line(rows: list[Row], along: str) -> dict[int, float]:
    """Value of the column ``along`` -> the smallest median time in milliseconds among the rows that have it."""
    line: dict[int, float] = {}
    for row in rows:
        place, time_ms = int(row[along]), float(row["time_ms_q50"])
        line[place] = min(time_ms, line.get(place, time_ms))
    return dict(sorted(line.items()))


def _of_last_machine(rows: list[Row]) -> list[Row]:
    """The rows of the machine measured last, of encoders with as many layers as there."""

    def kind(row: Row) -> tuple[str, ...]:
        return *machine_of(row), row["layers"]

    return [row for row in rows if kind(row) == kind(rows[-1])]


def _subplots(panels: list[Any], columns: int = 3, size: tuple[float, float] = (3.0, 3.2)) -> tuple[Any, list[Any]]:
    """A figure with a place for each panel and room for a legend."""
    return subplots(len(panels), columns, size, extra_width=1.5)


def _finish(figure: Any, rows: list[Row], path: Path) -> None:
    machine = machine_of(rows[-1])
    figure.suptitle(f"{machine[0]}, {machine[3]} threads", fontsize=9)
    save(figure, path)
