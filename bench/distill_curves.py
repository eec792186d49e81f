"""The losses and scores of runs over their steps, as distill-curves.csv and as a plot."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bench.harness import Row, format_value, read_rows

# What tells a run from others.
RUN_KEY = ("model", "kind", "name", "variant", "task", "seed")
COLUMNS = (*RUN_KEY, "series", "step", "value")
FILE = "distill-curves.csv"
# Of each series of a run.
MOST_POINTS = 60
_STAGES = {"finetune": "labels alone", "pretrain": "stage 1", "task": "stage 2"}


def curve_rows(run: Row, series: Mapping[str, tuple[list[int], list[float]]]) -> Iterator[Row]:
    """The loss and the evaluations of a run, thinned evenly; ``run`` has the columns of ``RUN_KEY``."""
    for name, (steps, values) in series.items():
        if name != "loss" and not name.startswith("eval/"):
            continue
        last = len(steps) - 1
        count = min(len(steps), MOST_POINTS)
        for index in (round(place * last / max(count - 1, 1)) for place in range(count)):
            yield {**{key: run[key] for key in RUN_KEY}, "series": name, "step": steps[index], "value": values[index]}


def write_curve_rows(rows: Iterable[Row], folder: Path) -> None:
    """Write rows to the file in ``folder``, in place of what it has of the same runs."""
    new = [{column: format_value(row[column]) for column in COLUMNS} for row in rows]
    replaced = {tuple(row[key] for key in RUN_KEY) for row in new}
    path = folder / FILE
    kept = [row for row in read_rows(path) if tuple(row[key] for key in RUN_KEY) not in replaced]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{FILE}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])
    os.replace(temporary, path)


def plot_curves(results: Path) -> None:
    """Write distill.png: the loss by step, a panel for each task and stage, of each run with the first seed."""
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    rows = read_rows(results / FILE)
    models = {row["model"] for row in rows}
    for row in rows:
        if row["series"] != "loss" or row["seed"] != "0":
            continue
        title = f"{row['task']}, {_STAGES[row['kind']]}"
        label = ", ".join(filter(None, (row["name"], row["variant"], row["model"] if len(models) > 1 else "")))
        steps, values = panels.setdefault(title, {}).setdefault(label, ([], []))
        steps.append(int(row["step"]))
        values.append(float(row["value"]))
    if panels:
        # Imports transformers, which takes seconds.
        from kron_kernels.distill.curves import write_overlay

        write_overlay(panels, results / "distill.png")
