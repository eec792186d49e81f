"""The demo's picture: what compression costs each layer, and what it saves in time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

FITS = {"Van Loan": "#b8b8b8", "data-aware": "#2a6f97"}
ROLES = {"attention": "attention", "ffn_in": "FFN in", "ffn_out": "FFN out"}
MODELS = {"dense": "#b8b8b8", "K8": "#61a5c2", "K21": "#014f86"}


def plot(path: Path, errors: list[dict[str, Any]], times: list[dict[str, Any]]) -> None:
    """Write the PNG: left the mean output error of each role, right the speed-up over the dense encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    groups = [(preset, role) for preset in dict.fromkeys(row["preset"] for row in errors) for role in ROLES]
    for offset, (fit, color) in enumerate(FITS.items()):
        heights = [
            statistics.mean(
                row["output_error"] for row in errors if (row["preset"], row["role"], row["fit"]) == (*group, fit)
            )
            for group in groups
        ]
        bars = left.bar([index + 0.4 * offset for index in range(len(groups))], heights, 0.38, label=fit, color=color)
        left.bar_label(bars, fmt="%.2f", fontsize=8)
    left.set_xticks([index + 0.2 for index in range(len(groups))], [f"{name}\n{ROLES[role]}" for name, role in groups])
    left.set_ylabel("relative error of the layer's output")
    left.set_title("all-MiniLM-L6-v2, held-out sentences, no training")
    left.legend(frameon=False)

    batches = list(dict.fromkeys(row["batch"] for row in times))
    timed = [row for row in times if "speedup_q50" in row]
    names = [name for name in MODELS if any(row["model"] == name for row in timed)]
    for offset, name in enumerate(names):
        rows = {row["batch"]: row for row in timed if row["model"] == name}
        heights = [rows[batch]["speedup_q50"] for batch in batches]
        low = [rows[batch]["speedup_q50"] - rows[batch]["speedup_q10"] for batch in batches]
        high = [rows[batch]["speedup_q90"] - rows[batch]["speedup_q50"] for batch in batches]
        places = [index + 0.27 * offset for index in range(len(batches))]
        bars = right.bar(places, heights, 0.25, yerr=(low, high), capsize=3, label=name, color=MODELS[name])
        labels = [f"{rows[batch]['time_ms_q50']:.0f} ms" for batch in batches]
        right.bar_label(bars, labels, padding=3, fontsize=8)
    right.set_xticks([index + 0.27 for index in range(len(batches))], [f"batch {batch} x 128" for batch in batches])
    right.set_ylabel("times faster than dense")
    right.set_title("BERT-base sizes, random weights, fp32 forward")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=140, format="png")
    temporary.replace(path)
