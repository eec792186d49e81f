"""Finished runs as one table, models by tasks, with their losses drawn over each other."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..compress.files import write_text
from ..testing.tables import markdown, save, subplots
from .curves import Points, read_series, write_overlay
from .run_folder import RunFolder, RunResult

NO_FIGURE = "-"
TEACHER = "teacher"


@dataclass(frozen=True)
class Run:
    """Hold a run as it was found; ``result`` is None before its end, ``steps`` are those logged so far."""

    folder: RunFolder
    result: RunResult | None
    steps: int


@dataclass(frozen=True)
class Score:
    """Hold a model's scores on a task in percent: the mean, and over several seeds the sample standard deviation."""

    mean: float
    spread: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.spread is None else f"{self.mean:.1f} ± {self.spread:.1f}"


@dataclass(frozen=True)
class Line:
    """Hold a model's line of the table.

    Attributes:
        model: its name and variant.
        scores: task -> score.
        average: mean over the tasks; None unless there is a score on every task of the table.
        kept: the sum of its scores over that of its teachers' on the same tasks, in percent; None without a teacher.
        parameters: smallest and largest over its runs, which differ by their heads.
        compression: parameters of the teacher over its own, the mean over its runs; None without a teacher.
    """

    model: str
    scores: Mapping[str, Score]
    average: float | None
    kept: float | None
    parameters: tuple[int, int]
    compression: float | None


@dataclass(frozen=True)
class Report:
    """Hold everything that ``kron-kernels report`` shows."""

    tasks: Sequence[str]
    lines: Sequence[Line]
    runs: Sequence[Run]
    notes: Sequence[str]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.result is None]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Make headers and rows of the models as text."""
        headers = ["model", *self.tasks, "average", "of the teacher", "parameters", "compression"]
        rows = [
            [
                line.model,
                *(str(line.scores.get(task, NO_FIGURE)) for task in self.tasks),
                _shown(line.average, "{:.1f}"),
                _shown(line.kept, "{:.1f} %"),
                _millions(line.parameters),
                _shown(line.compression, "{:.1f}x"),
            ]
            for line in self.lines
        ]
        return headers, rows

    def cost_table(self) -> tuple[list[str], list[list[str]]]:
        """Make headers and rows of the finished runs: what each took."""
        headers = ["model", "task", "seed", "score", "steps", "tokens", "seconds", "peak memory, MB", "folder"]
        rows = [
            [
                result.label,
                result.task,
                str(result.seed),
                _shown(result.score, "{:.1f}"),
                f"{result.steps:,}",
                _shown(result.train_tokens, "{:,}"),
                f"{result.seconds:,.0f}",
                NO_FIGURE if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 1e6:,.0f}",
                run.folder.path.name,
            ]
            for run in self.runs
            if (result := run.result) is not None
        ]
        return headers, rows

    def to_markdown(self) -> str:
        """Write both tables, the notes and the unfinished runs as Markdown."""
        parts = [markdown(*self.table())] if self.lines else ["No finished run has a score."]
        parts += self.remarks()
        if any(run.result is not None for run in self.runs):
            parts.append(markdown(*self.cost_table()))
        return "\n\n".join(parts) + "\n"

    def remarks(self) -> list[str]:
        """List what is to be known beside the table, a sentence each."""
        seeds = any(score.seeds > 1 for line in self.lines for score in line.scores.values())
        spread = ["± is the sample standard deviation over seeds."] if seeds else []
        unfinished = [f"Not finished, not counted: {run.folder.path} (step {run.steps})." for run in self.unfinished]
        return [*spread, *self.notes, *unfinished]

    def to_dict(self) -> dict[str, Any]:
        """Make a JSON-able dict."""
        finished = {str(run.folder.path): run.result.to_dict() for run in self.runs if run.result is not None}
        return {
            "version": 1,
            "tasks": list(self.tasks),
            "models": [asdict(line) for line in self.lines],
            "runs": finished,
            "unfinished": [{"run": str(run.folder.path), "steps": run.steps} for run in self.unfinished],
            "notes": list(self.notes),
        }


def build_report(paths: Iterable[str | os.PathLike[str]]) -> Report:
    """Read runs and put their scores together.

    Lines are told apart by the runs' name and variant; runs that differ in nothing but the seed are one line's. Where
    no run named "teacher" is among them, its line is made of the scores that the students' runs give for it.

    Args:
        paths: folders of runs.

    Raises:
        FileNotFoundError: a folder that is no run's.
        ValueError: no run, a damaged file, or two runs of the same model, task and seed.
    """
    runs = [_read(RunFolder(path)) for path in dict.fromkeys(Path(path) for path in paths)]
    if not runs:
        raise ValueError("runs: expected one or more folders, got none")
    seen: dict[tuple[Any, ...], Path] = {}
    for run in runs:
        if (result := run.result) is None:
            continue
        key = (result.kind, result.label, result.task, result.seed)
        if key in seen:
            raise ValueError(
                f"runs: expected one of {result.label}, {result.task}, seed {result.seed}; got {seen[key]} and "
                f"{run.folder.path}: leave one out, or give it a variant"
            )
        seen[key] = run.folder.path
    tasks, lines, notes = compare(run.result for run in runs if run.result is not None)
    return Report(tasks, lines, runs, notes)


def compare(results: Iterable[RunResult]) -> tuple[list[str], list[Line], list[str]]:
    """Compare results: tasks, lines and notes of a :class:`Report`, each of another model, task or seed.

    Lines go from the largest model to the smallest, the usual run of a model before its variants.
    """
    scored: dict[str, list[RunResult]] = {}
    for result in results:
        if result.score is not None:
            scored.setdefault(result.label, []).append(result)
    tasks = list(dict.fromkeys(result.task for found in scored.values() for result in found))
    lines, notes = [_line(label, found, tasks) for label, found in scored.items()], []
    teachers = [result for found in scored.values() for result in found if result.teacher_score is not None]
    if teachers and TEACHER not in scored:
        lines.append(_teacher_line(teachers, tasks))
    for task in tasks:
        given = sorted({result.teacher_score or 0.0 for result in teachers if result.task == task})
        if len(given) > 1:
            notes.append(f"The students' teachers differ on {task}: {' and '.join(f'{each:.1f}' for each in given)}.")
    return tasks, sorted(lines, key=lambda line: (-line.parameters[1], line.model)), notes


def write_report(report: Report, out: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.md``, ``table.png`` and ``curves.png`` to a folder, made if need be; those there was data for."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.md"]
    write_text(written[0], report.to_markdown())
    if report.lines:
        written.append(out / "table.png")
        _draw_table(*report.table(), written[-1])
    if (curves := write_overlay(_loss_panels(report.runs), out / "curves.png")) is not None:
        written.append(curves)
    return written


def _read(folder: RunFolder) -> Run:
    return Run(folder, folder.result, max((record.get("step", 0) for record in folder.log), default=0))


def _line(label: str, results: Sequence[RunResult], tasks: Sequence[str]) -> Line:
    scores = {task: score for task in tasks if (score := _score(results, task)) is not None}
    taught = [result for result in results if result.teacher_score]
    sums = [
        sum(_means(taught, lambda result: result.score)),
        sum(_means(taught, lambda result: result.teacher_score)),
    ]
    ratios = [result.teacher_parameters / result.parameters for result in results if result.teacher_parameters]
    return Line(
        label,
        scores,
        average=statistics.fmean(score.mean for score in scores.values()) if len(scores) == len(tasks) else None,
        kept=100 * sums[0] / sums[1] if sums[1] else None,
        parameters=(min(result.parameters for result in results), max(result.parameters for result in results)),
        compression=statistics.fmean(ratios) if ratios else None,
    )


def _teacher_line(taught: Sequence[RunResult], tasks: Sequence[str]) -> Line:
    """The teacher's line as its students' runs have it: seeds of a student are not seeds of the teacher."""
    given = {task: [each.teacher_score for each in taught if each.task == task] for task in tasks}
    scores = {
        task: Score(statistics.fmean(value for value in values if value is not None), None, 1)
        for task, values in given.items()
        if values
    }
    average = statistics.fmean(score.mean for score in scores.values()) if len(scores) == len(tasks) else None
    sizes = [each.teacher_parameters for each in taught if each.teacher_parameters] or [0]
    return Line(TEACHER, scores, average, 100.0, (min(sizes), max(sizes)), 1.0)


def _score(results: Sequence[RunResult], task: str) -> Score | None:
    values = [result.score for result in results if result.task == task and result.score is not None]
    if not values:
        return None
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _means(results: Sequence[RunResult], of: Callable[[RunResult], float | None]) -> list[float]:
    """The mean over the seeds for each task."""
    by_task: dict[str, list[float]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(of(result) or 0.0)
    return [statistics.fmean(values) for values in by_task.values()]


def _loss_panels(runs: Sequence[Run]) -> dict[str, dict[str, Points]]:
    """Task -> label of the run -> its loss over the steps; unfinished runs go by the names of their folders."""
    panels: dict[str, dict[str, Points]] = {}
    for run in runs:
        points = read_series(run.folder.log).get("loss")
        if points is not None:
            result, name = run.result, run.folder.path.name
            title = "not finished" if result is None else f"{result.task}, {result.kind}"
            label = name if result is None else f"{result.label}, seed {result.seed}"
            panels.setdefault(title, {})[label] = points
    return panels


def _draw_table(headers: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(map(len, column)) + 2 for column in columns]
    figure, (panel,) = subplots(1, 1, (0.085 * sum(widths), 0.28 * (len(rows) + 1)))
    panel.axis("off")
    table = panel.table(
        cellText=rows,
        colLabels=headers,
        colWidths=[width / sum(widths) for width in widths],
        cellLoc="right",
        colLoc="right",
        bbox=(0, 0, 1, 1),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "B"
        cell.set_linewidth(0.8 if row == 0 else 0.3)
        if column == 0:
            cell.set_text_props(ha="left")
    save(figure, path)


def _shown(value: float | None, form: str) -> str:
    return NO_FIGURE if value is None else form.format(value)


def _millions(span: tuple[int, int]) -> str:
    if not span[1]:
        return NO_FIGURE
    low, high = (f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}" for count in span)
    return low if low == high else f"{low.removesuffix(' M')} to {high}"
