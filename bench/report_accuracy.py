"""Tables of the distillation: what is kept of the teacher's accuracy, and what each part of the recipe is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.distill_curves import RUN_KEY
from bench.harness import Row, read_rows
from bench.tables import Judged, details, link, machine_of, markdown, missed_table, number
from bench.targets import Verdict, accuracy_reach

if TYPE_CHECKING:
    from kron_kernels.distill.report import Line
    from kron_kernels.distill.run_result import RunResult

TITLE = "### Accuracy kept by distillation"


def accuracy_parts(results: Path) -> list[str]:
    """The section made from distill.csv: a part for each model that was distilled; nothing without the file."""
    rows = read_rows(results / "distill.csv")
    parts = [TITLE] if rows else []
    for model in dict.fromkeys(row["model"] for row in rows):
        # A run that was done on several machines counts once, as it was done last.
        latest: dict[tuple[str, ...], Row] = {}
        for row in sorted((row for row in rows if row["model"] == model), key=lambda row: row["date"]):
            latest[tuple(row[key] for key in RUN_KEY)] = row
        parts += _model_parts(model, list(latest.values()))
    if rows and (results / "distill.png").exists():
        parts.append(f"![Loss of the distillation by step]({link(results / 'distill.png')})")
    return parts


def _model_parts(model: str, rows: list[Row]) -> list[str]:
    # Imports transformers, which takes seconds.
    from kron_kernels.distill.report import TEACHER, compare

    scored = [row for row in rows if row["score"]]
    usual = [row for row in scored if not row["variant"] and (row["kind"] == "task" or row["name"] == TEACHER)]
    parts = [f"**{model}.** {_budget(rows)}"]
    tasks, lines, notes = compare(_results(usual, scored))
    if lines:
        parts += [_scores_told(tasks, lines), _table(tasks, lines), *notes]
        parts += _fallen_short(tasks, lines)
    varied = {row["task"] for row in scored if row["variant"]}
    names = {row["name"] for row in scored if row["variant"]}
    chosen = [row for row in scored if row["task"] in varied and row["name"] in {*names, TEACHER}]
    if chosen:
        tasks, lines, _ = compare(_results(chosen, scored))
        parts += [
            f"What each part is worth ({model}, on the tasks these runs were made for; a line without a variant is "
            "that of the table above on the same tasks):",
            _table(tasks, lines, judged=False),
        ]
    parts.append(details("Distillation, all runs", _runs_table(rows)))
    return parts


def _results(rows: Iterable[Row], all_rows: Iterable[Row]) -> list[RunResult]:
    """Rows as results, all of them beside their task's teacher, those trained on labels alone too."""
    from kron_kernels.distill.report import TEACHER
    from kron_kernels.distill.run_result import RunResult

    teachers = {row["task"]: row for row in all_rows if row["name"] == TEACHER}
    results = []
    for row in rows:
        teacher = teachers.get(row["task"])
        score, parameters = row["teacher_score"], row["teacher_parameters"]
        if not score and teacher is not None:
            score, parameters = teacher["score"], teacher["parameters"]
        results.append(
            RunResult(
                **{key: row[key] for key in ("kind", "name", "variant", "task")},
                seed=int(row["seed"]),
                parameters=int(row["parameters"]),
                steps=int(row["steps"]),
                seconds=float(row["seconds"]),
                score=float(row["score"]),
                teacher_score=float(score) if score else None,
                teacher_parameters=int(parameters) if parameters else None,
            )
        )
    return results


def _table(tasks: Sequence[str], lines: Sequence[Line], judged: bool = True) -> str:
    from kron_kernels.distill.report import Report

    headers, cells = Report(tasks, lines, (), ()).table()
    if judged:
        column = headers.index("of the teacher")
        for line, row in zip(lines, cells, strict=True):
            if (verdict := _verdict(line)) is not None:
                row[column] += " ✗" if verdict.missed else " ✓"
    return markdown(headers, cells)


def _verdict(line: Line) -> Verdict | None:
    wanted = accuracy_reach(line.model)
    return None if wanted is None or line.kept is None else Verdict(line.kept, wanted)


def _scores_told(tasks: Sequence[str], lines: Sequence[Line]) -> str:
    """What the figures of the table are."""
    from kron_kernels.distill.data import get_task

    metrics = ", ".join(f"{task} {_metric(get_task(task).main)}" for task in tasks)
    told = f"Scores on the development sets, in percent: {metrics}. The share of the teacher's is that of the averages"
    partial = [line.model for line in lines if len(line.scores) < len(tasks)]
    told += f"; of {', '.join(partial)} on the tasks it has." if partial else "."
    seeds = {score.seeds for line in lines for score in line.scores.values()}
    if max(seeds) > 1:
        told += " ± is the sample standard deviation over seeds; a figure without it is of one run."
    else:
        told += " One run each, so that differences of a point may be chance."
    return told


def _metric(name: str) -> str:
    return {"f1": "F1", "matthews": "Matthews' correlation", "spearman": "Spearman's correlation"}.get(name, name)


def _budget(rows: Sequence[Row]) -> str:
    """What it was trained with and on."""
    machines = dict.fromkeys(machine_of(row) for row in rows)
    where = "; ".join(f"{cpu}, {cores} cores, {threads} threads a run" for cpu, _, cores, threads in machines)
    dates = sorted({row["date"] for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    told = f"Trained on {where} ({len(rows)} runs, {hours:.1f} hours of training together; "
    told += f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {commits})."
    stage_1 = [row for row in rows if row["kind"] == "pretrain" and not row["variant"]]
    if stage_1:
        told += (
            f" Stage 1: {_span(stage_1, 'train_tokens')} tokens of {stage_1[0]['task']} a student, {_epochs(stage_1)}."
        )
    stage_2 = [row for row in rows if row["kind"] == "task"]
    if stage_2:
        told += f" Stage 2: {_epochs(stage_2)}, by task."
    limits = {row["task"]: row["train_limit"] for row in rows if row["kind"] != "pretrain" and row.get("train_limit")}
    if limits:
        told += f" Of {', '.join(f'{task} {int(limit):,}' for task, limit in limits.items())} examples at most."
    return told


def _epochs(rows: Sequence[Row]) -> str:
    span = _span(rows, "epochs")
    return f"{span} epoch" + ("s" if span != "1" else "")


def _span(rows: Sequence[Row], column: str) -> str:
    values = sorted({float(row[column]) for row in rows if row.get(column)})
    return " to ".join(f"{value:,.10g}" for value in dict.fromkeys((values[0], values[-1]))) if values else "?"


def _judged(tasks: Sequence[str], lines: Sequence[Line]) -> list[Judged]:
    judged = []
    for line in lines:
        if (verdict := _verdict(line)) is not None:
            on = f"average over {', '.join(task for task in tasks if task in line.scores)}"
            judged.append(Judged(f"{line.model}, percent of the teacher's score", on, f"{line.kept:.2f}", verdict))
    return judged


def _fallen_short(tasks: Sequence[str], lines: Sequence[Line]) -> list[str]:
    judged = _judged(tasks, lines)
    missed = [each for each in judged if each.verdict.missed]
    if not missed:
        return []
    title = f"**What falls short** ({len(missed)} of {len(judged)} figures with a reach)"
    return [title, missed_table(missed, "measured")]


def _runs_table(rows: Sequence[Row]) -> str:
    lines = [
        (
            ", ".join(filter(None, (row["name"], row["variant"]))),
            row["kind"],
            row["task"],
            row["seed"],
            number(row, "score", ".1f"),
            number(row, "teacher_score", ".1f"),
            number(row, "epochs", "g"),
            number(row, "train_limit", ",.0f"),
            row["batch_size"] or "-",
            row["learning_rate"] or "-",
            number(row, "steps", ",.0f"),
            number(row, "train_tokens", ",.0f"),
            number(row, "seconds", ",.0f"),
            number(row, "peak_memory_mib", ",.0f"),
        )
        for row in rows
    ]
    headers = (
        *("model", "run", "task", "seed", "score", "teacher's", "epochs", "examples at most", "batch", "rate"),
        *("steps", "tokens", "seconds", "peak memory, MiB"),
    )
    return markdown(headers, lines)
