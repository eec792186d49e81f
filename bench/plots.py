"""Plots from layers.csv: speed-up over dense by rows of x, ours beside the best stock torch, a panel a layer."""

from __future__ import annotations

from pathlib import Path

from bench.harness import Row, read_rows
from bench.report import STOCK, machine_of
from bench.targets import reach

OURS, STOCK_COLOR, REACH = "#014f86", "#8d99ae", "#d62828"


def plot_layers(results: Path) -> None:
    """Write layers.png beside the CSV: float32 forward on the machine measured last, hot weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row
        for row in read_rows(results / "layers.csv")
        if (row["dtype"], row["direction"], row["weights"], row["status"]) == ("fp32", "forward", "hot", "ok")
    ]
    if not rows:
        return
    machine = machine_of(rows[-1])
    rows = [row for row in rows if machine_of(row) == machine]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    columns = min(3, len(cases))
    figure, axes = pyplot.subplots(
        -(-len(cases) // columns),
        columns,
        figsize=(4 * columns, 2.8 * -(-len(cases) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for panel, case in zip(axes.flat, cases, strict=False):
        mine = [row for row in rows if row["case"] == case]
        tokens = sorted({int(row["tokens"]) for row in mine})
        places = range(len(tokens))
        ours = [_value(mine, count, ("kron_kernels",), "speedup_q50") for count in tokens]
        low, high = (
            [_value(mine, count, ("kron_kernels",), column) for count in tokens]
            for column in ("speedup_q10", "speedup_q90")
        )
        panel.fill_between(places, low, high, color=OURS, alpha=0.2, linewidth=0)
        panel.plot(places, ours, "o-", color=OURS, label="kron_kernels")
        stock = [_value(mine, count, STOCK, "speedup_q50") for count in tokens]
        panel.plot(places, stock, "s--", color=STOCK_COLOR, label="best stock torch")
        wanted = [reach(case, "fp32", "forward", count, machine[1]) or float("nan") for count in tokens]
        panel.plot(places, wanted, "_", color=REACH, markersize=14, markeredgewidth=2, label="reach")
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set_xticks(list(places), [str(count) for count in tokens])
        panel.set_title(f"{case}: {mine[0]['factors'].replace('(x)', '⊗')}", fontsize=9)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes.flat[len(cases) :]:
        panel.set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("rows of x", fontsize=9)
    figure.supylabel("times faster than dense, fp32 forward", fontsize=9)
    figure.suptitle(f"{machine[0]}, {machine[3]} threads", fontsize=9)
    temporary = results / ".layers.png"
    figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
    temporary.replace(results / "layers.png")
    pyplot.close(figure)


def _value(rows: list[Row], tokens: int, variants: tuple[str, ...], column: str) -> float:
    """The largest figure among the variants, NaN where none was timed."""
    found = [float(row[column]) for row in rows if int(row["tokens"]) == tokens and row["variant"] in variants]
    return max(found, default=float("nan"))
