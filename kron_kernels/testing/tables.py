"""What reports are made of: Markdown tables and PNG files. Used by ``distill`` and by the benchmarks outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def subplots(panels: int, columns: int, size: tuple[float, float], extra_width: float = 0) -> tuple[Any, list[Any]]:
    """A figure with ``panels`` places of ``size`` inches, without a display, in rows of at most ``columns``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figsize = (size[0] * columns + extra_width, size[1] * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained")
    for panel in axes.flat[panels:]:
        panel.set_visible(False)
    return figure, list(axes.flat)[:panels]
