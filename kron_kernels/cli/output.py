"""What the commands print: tables or one JSON document on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
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
    """Progress lines on stderr, ``[ 3/24] name``; on a terminal they overwrite each other.

    Called as ``progress(done, total, what)``.
    """

    def __init__(self, stream: TextIO | None = None, *, every_seconds: float = 1.0) -> None:
        self._stream = stream or sys.stderr
        self._every = every_seconds
        self._last = float("-inf")
        self._terminal = self._stream.isatty()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done < total and now - self._last < (0.1 if self._terminal else self._every):
            return
        self._last = now
        line = f"[{done:{len(str(total))}}/{total}] {what}"
        if self._terminal:
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if done >= total else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _numeric(text: str) -> bool:
    return text.replace(",", "").replace(".", "").strip("x%+-").isdigit() or text in {"-", ""}
