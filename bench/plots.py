"""Plots of layers and feed-forward blocks: speed-up over dense by rows of x, a panel a case; and all plots at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.distill_curves import plot_curves
from bench.harness import Row, read_rows
from bench.plots_model import plot_latency, plot_profile
from bench.report_layers import STOCK
from bench.tables import machine_of
from bench.targets import reach
from kron_kernels.testing import PEAK
from kron_kernels.testing.tables import save

OURS, STOCK_COLOR, DENSE_COLOR, REACH = "#014f86", "#8d99ae", "#bc6c25", "#d62828"


def plot_all(results: Path) -> None:
    """Every plot that there are rows for, beside the CSV files."""
    plot_layers(results)
    plot_ffn(results)
    plot_profile(results)
    plot_latency(results)
    plot_curves(results)


def plot_layers(results: Path) -> None:
    """Write layers.png: float32 forward on the machine measured last, hot weights."""
    _plot_panels(results, "layers", ("fp32",), {"best stock torch": (STOCK, STOCK_COLOR)}, 3)


def plot_ffn(results: Path) -> None:
    """Write ffn.png: the same of feed-forward blocks, in float32 and bfloat16."""
    lines = {
        "best stock torch on the factors": (STOCK, STOCK_COLOR),
        "best other dense": (("dense, packed", "dense, compiled"), DENSE_COLOR),
    }
    _plot_panels(results, "ffn", ("fp32", "bf16"), lines, 3)


def _plot_panels(
    results: Path,
    name: str,
    dtypes: Sequence[str],
    lines: Mapping[str, tuple[Sequence[str], str]],
    columns: int,
) -> None:
    """``name``.csv as panels, one for each dtype and case; ``lines``: label -> variants, the best of which is drawn."""
    rows = [
        row
        for row in read_rows(results / f"{name}.csv")
        if (row["direction"], row["weights"], row["status"]) == ("forward", "hot", "ok")
        and row["dtype"] in dtypes
        and row["variant"] != PEAK
    ]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machine = machine_of(rows[-1])
    rows = [row for row in rows if machine_of(row) == machine]
    panels = list(dict.fromkeys((row["dtype"], row["case"]) for row in rows))
    columns = min(columns, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4 * columns, 2.8 * height), squeeze=False, layout="constrained"
    )
    for panel, (dtype, case) in zip(axes.flat, panels, strict=False):
        mine = [row for row in rows if (row["dtype"], row["case"]) == (dtype, case)]
        _draw(panel, mine, lines, machine[1])
        title = f"{case}: {mine[0]['factors'].replace('(x)', '⊗').replace('->', '→')}"
        panel.set_title(title if len(dtypes) == 1 else f"{dtype}, {title}", fontsize=9 if len(dtypes) == 1 else 8)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("rows of x", fontsize=9)
    figure.supylabel(f"times faster than dense, {' and '.join(dtypes)} forward", fontsize=9)
    figure.suptitle(f"{machine[0]}, {machine[3]} threads", fontsize=9)
    save(figure, results / f"{name}.png")


def _draw(panel: Any, rows: list[Row], lines: Mapping[str, tuple[Sequence[str], str]], isa: str) -> None:
    tokens = sorted({int(row["tokens"]) for row in rows})
    places = range(len(tokens))

    def values(variants: Sequence[str], column: str = "speedup_q50") -> list[float]:
        return [_value(rows, count, variants, column) for count in tokens]

    ours = ("kron_kernels",)
    low, high = values(ours, "speedup_q10"), values(ours, "speedup_q90")
    panel.fill_between(places, low, high, color=OURS, alpha=0.2, linewidth=0)
    panel.plot(places, values(ours), "o-", color=OURS, label="kron_kernels")
    for label, (variants, color) in lines.items():
        panel.plot(places, values(variants), "s--", color=color, label=label)
    first = rows[0]
    wanted = [reach(first["case"], first["dtype"], "forward", count, isa) or float("nan") for count in tokens]
    panel.plot(places, wanted, "_", color=REACH, markersize=14, markeredgewidth=2, label="reach")
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set_xticks(list(places), [str(count) for count in tokens])
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)


def _value(rows: list[Row], tokens: int, variants: Sequence[str], column: str) -> float:
    """The largest figure among the variants, NaN where none was timed."""
    found = [float(row[column]) for row in rows if int(row["tokens"]) == tokens and row["variant"] in variants]
    return max(found, default=float("nan"))
