"""What the commands print: tables or one JSON document on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """``--json``: one JSON document on stdout instead of tables."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by width: text to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(header), *(len(row[index]) for row in cells)]) for index, header in enumerate(headers)]
    right = [
        bool(rows) and all(isinstance(row[index], int | float) or _numeric(str(row[index])) for row in rows)
        for index in range(len(headers))
    ]

    def line(values: Sequence[str]) -> str:
        parts = (
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(values, widths, right, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def print_json(document: dict[str, Any]) -> None:
    """The document on stdout; what JSON does not know is written as text."""
    print(json.dumps(document, indent=2, default=str))


class Progress:
    """A progress bar with the time left for each long step, on stderr; called as ``progress(done, total, what)``.

    A call that does not go on from the last one (another total, or fewer done) begins the next step's bar. Where stderr
    is no terminal a line is written every ``every_seconds`` and at the end of each step.
    """

    def __init__(self, stream: TextIO | None = None, *, every_seconds: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._every = 0.1 if self._stream.isatty() else every_seconds
        self._bar: Any = None

    def __call__(self, done: int, total: int, what: str) -> None:
        from tqdm import tqdm

        if self._bar is None or total != self._bar.total or done <= self._bar.n:
            if self._bar is not None:
                self._bar.close()
            terminal = self._stream.isatty()
            looks: dict[str, Any] = {"dynamic_ncols": terminal, "ascii": True, "delay": 1e-7}  # no line at 0 %
            self._bar = tqdm(total=total, file=self._stream, mininterval=self._every, miniters=1, **looks)
        self._bar.set_description(what, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == 0:
            self._bar.refresh()  # a step that is announced before it is done
        if done >= total:
            self._bar.close()
            self._bar = None


def _numeric(text: str) -> bool:
    return text.replace(",", "").replace(".", "").strip("x%+-").isdigit() or text in {"-", ""}
