"""The README stays short, and its figures are those of docs/results."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_figures(heading: str) -> list[str]:
    """The numbers in the tables of a section: "124.1", "3.2x", "85.9"."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [figure for row in rows for cell in row.split("|")[2:] for figure in re.findall(r"\d+\.\d+x?", cell)]


def test_readme_is_short() -> None:
    assert README.count("\n") <= 200


def test_figures_are_those_of_the_results() -> None:
    summary = (ROOT / "docs/results/summary.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\d+\.\d+x?", summary))
    known |= {f"{float(figure):.1f}" for figure in known if not figure.endswith("x")}
    for heading in ("Speed", "Accuracy"):
        figures = table_figures(heading)
        assert figures
        unknown = [figure for figure in figures if figure not in known]
        assert not unknown, f"{heading}: not in docs/results/summary.md: {unknown}"


def test_links_and_pictures_exist() -> None:
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
