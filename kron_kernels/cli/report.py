"""``kron-kernels report``: folders of distillation runs in, a table of models by tasks out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .extras import needs_extra
from .output import add_json_flag, format_table, print_json


def add_parser(commands: Any) -> None:
    """Add the ``report`` command."""
    parser = commands.add_parser(
        "report",
        help="compare runs of the distillation",
        description="Put the results of runs together: scores of models by tasks, with the mean and the spread over "
        "seeds, the share of the teacher's scores that is kept, and what each run took. Runs that have not finished "
        "are named and not counted.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md, table.png and curves.png there")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read the runs, print the report and, where asked for, write it."""
    with needs_extra("distill"):
        from ..distill.report import build_report, write_report

    report = build_report(arguments.runs)
    written = [] if arguments.out is None else write_report(report, arguments.out)
    if arguments.json:
        print_json({**report.to_dict(), "written": [str(path) for path in written]})
        return 0
    print(format_table(*report.table()) if report.lines else "No finished run has a score.")
    if remarks := report.remarks():
        print("\n" + "\n".join(remarks))
    headers, rows = report.cost_table()
    if rows:
        print("\n" + format_table(headers, rows))
    if written:
        print("\nwritten: " + ", ".join(map(str, written)))
    return 0
