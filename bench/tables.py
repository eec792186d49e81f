"""What the sections of the report share: Markdown, figures in cells, machines, and what fell short of its reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import ROOT, Row
from bench.targets import Verdict
from kron_kernels.testing.tables import markdown

MACHINE_KEY = ("cpu", "isa", "cores", "threads")


@dataclass(frozen=True)
class Judged:
    """One figure that had a reach: what it is of, at which point, as shown, and what there is to say to it."""

    what: str
    point: str
    shown: str
    verdict: Verdict
    note: str = ""


def machine_of(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in MACHINE_KEY)


def details(summary: str, text: str) -> str:
    """Text that is folded away."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def figure(row: Row | None, prefix: str = "speedup") -> str:
    """The median of a row's ratio, "-" where there is none."""
    return f"{float(row[f'{prefix}_q50']):.2f}" if row and row.get(f"{prefix}_q50") else "-"


def with_range(row: Row | None, prefix: str = "speedup") -> str:
    """The same with its 10 % and 90 % quantiles."""
    if figure(row, prefix) == "-" or row is None:
        return "-"
    return f"{figure(row, prefix)} ({float(row[f'{prefix}_q10']):.2f} to {float(row[f'{prefix}_q90']):.2f})"


def number(row: Row, column: str, form: str = ".0f") -> str:
    """A column of a row, "-" where it is empty or absent."""
    return format(float(row[column]), form) if row.get(column) else "-"


def missed_table(judged: Sequence[Judged], measured: str = "measured (10 % to 90 %)") -> str:
    """Those that fell short, in the order they come; ``measured`` is the title of the figures."""
    lines = [
        (each.what, each.point, each.shown, f"{'≤' if each.verdict.at_most else '≥'} {each.verdict.reach:g}", each.note)
        for each in judged
        if each.verdict.missed
    ]
    return markdown(("", "at", measured, "reach", ""), lines)


def link(path: Path) -> str:
    """A path as the README links to it."""
    return path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else path.name
