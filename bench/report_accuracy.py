"""The page of accuracy: what compressed models keep of their teacher, how close they start, orders of channels."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.harness import Row, read_rows
from kron_kernels.testing.tables import markdown

TEACHER = "teacher"
ABOUT = """# Accuracy of compressed encoders

Scores on GLUE's development sets in percent: Spearman's correlation (stsb), accuracy (mrpc, sst2, rte), Matthews'
correlation (cola). "Kept" is the share of the teacher's average over the tasks a model has. ± is the sample standard
deviation over seeds; a figure without it is of one run, so that differences of a point may be chance.
"""
ENCODERS = """## Sentence encoders, distilled on plain text

`kron-kernels distill encoder`: the student learns the teacher's sentence vectors from sentences without labels.
Spearman's correlation of the cosines of sentence pairs with their labels (stsb: 1,500 pairs, development set), in
percent, and the share of the teacher's; one seed, so that a point may be chance. All weights, one scale a row where
they are rounded (rounded after training); minutes of one thread on a machine that did other work too, without the
teacher's vectors (18 minutes for 120,000 sentences). K21's size: ranks 8 (attention) and 12 (feed-forward), bands of
1,000 x 128, 4,000 x 48 and the rest x 16, untrained 73.8; K8's: 28 and 42, 2,000 x 192, 8,000 x 64, the rest x 24,
untrained 77.5; both 128 positions. The text: WikiText-2, Brown, WordNet's glosses and the sentences of GLUE's
training sets without their labels, none of them in the development set."""
WARM = """## Before any distillation

Starts of a compressed encoder: fitted to the weights alone ("plain") or to what layers put out on text, then trained
block by block. Errors are relative; agreement is the mean cosine of sentence embeddings with the dense model's."""
ORDERS = """## Orders of channels

Mean relative error of the nearest factors before and after a search for orders of rows and columns."""


def accuracy(results: Path) -> str:
    """Return the page, from accuracy.csv, warm-start.csv and orders.csv."""
    parts = [ABOUT]
    if encoders := read_rows(results / "encoders.csv"):
        parts += [ENCODERS, encoder_table(encoders)]
    rows = read_rows(results / "accuracy.csv")
    for model in dict.fromkeys(row["model"] for row in rows):
        parts += model_parts(model, [row for row in rows if row["model"] == model])
    if warm := read_rows(results / "warm-start.csv"):
        quantities = list(dict.fromkeys(row["quantity"] for row in warm))
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for row in warm:
            found.setdefault((row["model"], row["preset"], row["start"]), {})[row["quantity"]] = row["value"]
        lines = [(*key, *(each.get(name, "-") for name in quantities)) for key, each in found.items()]
        parts += [WARM, markdown(("model", "preset", "start", *quantities), lines)]
    if orders := read_rows(results / "orders.csv"):
        columns = ("weights", "pair", "count", "rounds", "before", "after")
        parts += [ORDERS, markdown(columns, [[row[name] for name in columns] for row in orders])]
    return "\n\n".join(parts) + "\n"


def encoder_table(rows: Sequence[Row]) -> str:
    """Return a line for each model and the bits of its weights."""
    lines = []
    for row in rows:
        key = (row["teacher"], row["task"], TEACHER, "")
        whole = next(each for each in rows if tuple(each[c] for c in ("teacher", "task", "model", "variant")) == key)
        kept = float(row["score"]) / float(whole["score"])
        size = f"{int(row['bytes']) / 1e6:.1f} MB"
        name = f"{row['model']}, {row['variant']}" if row["variant"] else row["model"]
        line = (row["teacher"], row["task"], name, f"{int(row['parameters']) / 1e6:.2f}M", size)
        lines.append((*line, row["score"], f"{kept:.1%}", row["minutes"] or "-", row["steps"] or "-"))
    heads = ("teacher", "task", "model", "parameters", "weights", "score", "kept", "minutes", "steps")
    return markdown(heads, lines)


def model_parts(model: str, rows: list[Row]) -> list[str]:
    """Return the scores of one distilled model, of the variants of its recipe, and all runs."""
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    about = f"{rows[0]['machine']}: {len(rows)} runs, {hours:.1f} hours, commit {commits}."
    scored = [row for row in rows if row["score"]]
    main = [row for row in scored if not row["variant"] and (row["kind"] == "task" or row["name"] == TEACHER)]
    parts = [f"## {model}", about, score_table(main)]
    varied = {(row["name"], row["task"]) for row in scored if row["variant"]}
    if varied:
        tasks = {task for _, task in varied}
        names = {TEACHER, *(name for name, _ in varied)}
        parts += ["What each part of the recipe is worth:"]
        parts += [score_table([row for row in scored if row["name"] in names and row["task"] in tasks])]
    columns = ("name", "variant", "kind", "task", "seed", "score", "epochs", "batch_size", "learning_rate", "steps")
    runs = markdown((*columns, "seconds"), [[row[name] for name in (*columns, "seconds")] for row in rows])
    return [*parts, f"<details><summary>All runs</summary>\n\n{runs}\n\n</details>"]


def score_table(rows: Iterable[Row]) -> str:
    """Return a line for each model and variant: means over seeds by task, their average, and what is kept."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    parameters: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["name"], row["variant"])
        scores.setdefault(key, {}).setdefault(row["task"], []).append(float(row["score"]))
        parameters[key] = int(row["parameters"])
    tasks = list(dict.fromkeys(task for each in scores.values() for task in each))
    teacher = {task: statistics.mean(values) for task, values in scores.get((TEACHER, ""), {}).items()}
    lines = []
    for (name, variant), each in sorted(scores.items(), key=lambda item: (item[0][0] != TEACHER, item[0])):
        mean = {task: statistics.mean(values) for task, values in each.items()}
        whole = [task for task in mean if task in teacher]
        kept = sum(mean[task] for task in whole) / sum(teacher[task] for task in whole) if whole else None
        label = f"{name}, {variant}" if variant else name
        cells = [_score(each.get(task, ())) for task in tasks]
        size = f"{parameters[name, variant] / 1e6:.2f} M"
        average = f"{statistics.mean(mean.values()):.1f}"
        lines.append((label, *cells, average, "-" if kept is None else f"{kept:.1%}", size))
    return markdown(("model", *tasks, "average", "kept", "parameters"), lines)


def _score(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
