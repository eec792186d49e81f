"""Rows of TSV, CSV, JSON and parquet files as columns, with the line of each row for the errors."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from .tasks import Task

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_logger = logging.getLogger("kron_kernels")


@dataclass(frozen=True)
class Table:
    """Columns of a file, all of one length, and the line (or, in parquet, the row) that each row came from."""

    path: str | Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    unit: str = "line"

    def where(self, row: int) -> str:
        """File and line of a row."""
        return f"{self.path}, {self.unit} {self.lines[row]}"


def suffix(path: Path) -> str:
    """The suffix that tells the format: that before a ``.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_table(path: Path, task: Task) -> Table:
    """The rows of a file of one of ``SUFFIXES``, each but parquet also with ``.gz``, as columns.

    Raises ValueError, with file and line, for an empty file, a wrong number of columns, malformed JSON and bytes that
    are not UTF-8; OSError for a file that cannot be read.
    """
    kind = suffix(path)
    if kind == ".parquet":
        table = read_parquet(path)
    elif kind == ".tsv":
        table = _tsv(path, task)
    elif kind == ".csv":
        table = _csv(path)
    elif kind in (".jsonl", ".json"):
        table = _squad(path) if kind == ".json" and task.kind == "qa" else read_jsonl(path)
    else:
        raise ValueError(f"source: expected a file of {', '.join(SUFFIXES)}, got {path}")
    if not table.lines:
        raise ValueError(f"{path}: expected rows, got none")
    return table


def open_text(path: Path) -> Any:
    """A binary stream of a file, unpacked if it ends in ``.gz``."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without line ends and byte-order mark.

    Only line feeds separate lines: str.splitlines would also split at control characters within a sentence.
    """
    number = 0
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: expected UTF-8 text, got {error}") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: expected a whole gzip file, got {error}") from error


def column(table: Table, names: Sequence[str], what: str) -> list[Any]:
    """The column of the first of these names that is there; ValueError where none is."""
    for name in names:
        if name in table.columns:
            return table.columns[name]
    raise ValueError(
        f"{table.path}: expected a column {' or '.join(map(repr, names))} for the {what}, "
        f"got {', '.join(map(repr, table.columns))}"
    )


def strings(table: Table, values: list[Any], what: str) -> list[str]:
    """These values of a table's column if all are strings; ValueError, with file and line, if not."""
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"{table.where(row)}: {what}: expected a string, got {value!r}")
    return values


def _tsv(path: Path, task: Task) -> Table:
    # GLUE's quotes are part of the text and unbalanced: tabs alone separate.
    rows = ((number, line.split("\t")) for number, line in read_lines(path) if line)
    return _rows(path, rows, task.headerless, {name for names in task.text for name in names}, task.skip_short_rows)


def _csv(path: Path) -> Table:
    reader = csv.reader((line + "\n" for _, line in read_lines(path)), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            yield from ((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got {error}") from error

    return _rows(path, rows(), None, set(), False)


def _rows(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    headerless: tuple[str, ...] | None,
    texts: set[str],
    skip_short_rows: bool,
) -> Table:
    number, header = next(rows, (0, []))
    data: list[list[str]] = []
    lines: list[int] = []
    if headerless is not None and not texts.intersection(header):
        first, header = [(number, header)] if number else [], list(headerless)
    else:
        first = []
    if len(set(header)) < len(header):
        raise ValueError(f"{path}, line {number}: expected distinct names of columns, got {', '.join(header)}")
    skipped = 0
    for found in (first, rows):
        for number, row in found:
            if len(row) == len(header):
                data.append(row)
                lines.append(number)
            elif skip_short_rows and len(row) < len(header):
                skipped += 1
            else:
                raise ValueError(f"{path}, line {number}: expected {len(header)} columns, got {len(row)}")
    if skipped:
        _logger.warning("%s: left out %d rows with fewer than %d columns", path, skipped, len(header))
    columns = list(zip(*data, strict=True)) if data else [()] * len(header)
    return Table(path, {name: list(column) for name, column in zip(header, columns, strict=True)}, lines)


def read_jsonl(path: Path) -> Table:
    """A JSON object a line, all with the same keys; errors as :func:`read_table`."""
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON, {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object a line, got {type(record).__name__}")
        if records and record.keys() != records[0].keys():
            raise ValueError(
                f"{path}, line {number}: expected the columns of the first line, {', '.join(records[0])}, "
                f"got {', '.join(record)}"
            )
        records.append(record)
        lines.append(number)
    names = records[0] if records else {}
    return Table(path, {name: [record[name] for record in records] for name in names}, lines)


def read_parquet(path: Path) -> Table:
    """A parquet file; errors as :func:`read_table`."""
    try:
        table = parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a parquet file, got {error}") from error
    return Table(path, table.to_pydict(), list(range(1, len(table) + 1)), "row")


def _squad(path: Path) -> Table:
    """SQuAD's release: {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: malformed JSON, {error.msg} at column {error.colno}") from error
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "title", "context", "question", "answers")}
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible", False) else question["answers"]
                    columns["id"].append(question["id"])
                    columns["title"].append(article.get("title", ""))
                    columns["context"].append(paragraph["context"])
                    columns["question"].append(question["question"])
                    columns["answers"].append(
                        {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        }
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected SQuAD's data, paragraphs and qas after {len(columns['id'])} questions, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return Table(path, columns, list(range(1, len(columns["id"]) + 1)), "question")
