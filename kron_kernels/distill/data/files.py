"""A task's data from a folder, files or the hub, read by ``datasets`` into one form; and its tokens."""

from __future__ import annotations

import csv
import dataclasses
import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from .tasks import Task, class_names, convert_label, get_task

Source = str | os.PathLike[str]
_LOG = logging.getLogger(__name__)

_TEXT = {"keep_default_na": False, "encoding": "utf-8-sig"}
# Suffix -> reader of ``datasets`` and its options. GLUE's quotes are part of the text: tabs alone separate.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".tsv": ("csv", {"delimiter": "\t", "quoting": csv.QUOTE_NONE, **_TEXT}),
    ".csv": ("csv", _TEXT),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
# What the files of each split may be called, apart from the suffix. The validation set of MNLI is the matched one.
_STEMS = {
    "train": r"train(-v\d\.\d)?",
    "validation": r"(dev|valid|validation)(_matched|-v\d\.\d)?",
    "validation_mismatched": r"(dev|valid|validation)_mismatched",
    "test": r"test(_matched|-v\d\.\d)?",
    "test_mismatched": r"test_mismatched",
}


def suffix(path: Path) -> str:
    """Give the suffix that tells the format: the one before a ``.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_rows(path: Path, **options: Any) -> list[dict[str, Any]]:
    """Read the rows of a file by the reader of its suffix (``READERS``), also packed by gzip.

    ``options`` go to the reader. Streamed, so that ``datasets`` leaves no copy on the disk.
    Raises ValueError, with the file's name, for another suffix, a file that is damaged and one without rows.
    """
    if suffix(path) not in READERS:
        raise ValueError(f"{path}: expected a file of {', '.join(READERS)}")
    reader, settings = READERS[suffix(path)]
    files = glob.escape(str(path.absolute()))
    try:
        rows = list(
            datasets.load_dataset(reader, data_files=files, split="train", streaming=True, **{**settings, **options})
        )
    except Exception as error:  # each reader has its own kinds
        raise ValueError(f"{path}: cannot be read as {reader}: {_reason(error)}") from error
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    return rows


def load_hub(name: Source, configuration: str | None = None, split: str | None = None) -> Any:
    """Load a data set of the hub by its name and ``:configuration``, or one split of it.

    Raises FileNotFoundError for what can only be a path, OSError for a data set that cannot be loaded.
    """
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).suffix in (*READERS, ".gz"):
        raise FileNotFoundError(f"data: expected a folder, a file or a data set's name, got {text}")
    repository, _, given = text.partition(":")
    try:
        return datasets.load_dataset(repository, given or configuration, split=split)
    except Exception as error:  # the client of the hub, that of HTTP and the readers have many kinds
        raise OSError(
            f"data: {text} is neither a local folder or file nor can be loaded from the hub: {_reason(error)}"
        ) from error


def load_task(source: Source, task: str | Task, splits: Sequence[str] | None = None) -> datasets.DatasetDict:
    """Load the data of a task, each split with the columns that all tasks share.

    Columns: ``text``, ``text_pair`` (tasks of two texts) and ``label``, a class label with the names of the classes or
    a float. Question answering: ``id``, ``context``, ``question`` and ``answers`` (a dict of two lists, ``text`` and
    ``answer_start`` in characters). A test set without labels has no ``label``.

    Args:
        source: a local folder with ``train.*`` and ``dev.*`` or ``validation.*`` (and ``test.*``) as .tsv, .csv,
            .jsonl, .json (a JSON object a line, or SQuAD's release) or .parquet; one file, taken as the validation
            set; or a dataset's name on the hub ("glue" for GLUE), with ``:configuration`` where it has several.
        task: a task or its name. Classes without names are those found in the training set (without one, in the rest).
        splits: the splits to read, which must be there; by default train and validation, with the others if present.

    Raises:
        OSError: a source that is not there, or that could not be downloaded.
        ValueError: a file that is not as expected; the message names file and row.
    """
    task = get_task(task)
    found = _find(Path(source) if os.path.exists(source) else str(source), task)
    required = splits or (() if os.path.isfile(source) else ("train", "validation"))
    if missing := [split for split in required if split not in found]:
        raise FileNotFoundError(f"data: expected {' and '.join(missing)} data, got {', '.join(found)} in {source}")
    kept = list(splits or found)
    from_train = task.kind == "classification" and not task.labels and "train" in found
    tables = {
        split: (str(table), _read(table, task)) if isinstance(table, Path) else (f"{source}/{split}", table)
        for split, table in found.items()
        if split in kept or (from_train and split == "train")
    }
    if task.kind == "classification" and not task.labels:
        named = [tables["train"]] if from_train else list(tables.values())
        names = class_names([_column(where, rows, task.label, row) for where, rows in named for row in rows])
        if len(names) < 2:
            raise ValueError(f"{named[0][0]}: expected at least two classes, got {', '.join(map(repr, names))} alone")
        task = dataclasses.replace(task, labels=names)
    return datasets.DatasetDict({split: _normalised(tables[split][0], tables[split][1], task, split) for split in kept})


def resolved(task: str | Task, data: datasets.DatasetDict) -> Task:
    """Give the task the names of the classes that :func:`load_task` found, if it had none."""
    task = get_task(task)
    if task.kind != "classification" or task.labels:
        return task
    feature = next(split.features["label"] for split in data.values() if "label" in split.features)
    return dataclasses.replace(task, labels=tuple(feature.names))


def encode(data: Any, tokenizer: Any, task: Task, max_length: int = 128) -> Any:
    """Tokenize a Dataset of :func:`load_task` for a classification or a regression, without padding.

    Columns: ``input_ids``, ``token_type_ids`` and ``attention_mask`` (lists of ``length`` integers), ``length``, and
    ``labels`` where there is a label. Longer inputs are cut to ``max_length`` tokens, special tokens included; of a
    pair the longer text first. Raises ValueError for a ``max_length`` without room for text.
    """
    least = tokenizer.num_special_tokens_to_add(task.pair) + len(task.text)
    if max_length < least:
        raise ValueError(f"max_length: expected at least {least}, got {max_length}")

    def tokenized(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = (batch["text"], batch["text_pair"] if task.pair else None)
        columns = dict(tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=True))
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        return columns | ({"labels": batch["label"]} if "label" in batch else {})

    return mapped(data, tokenized)


def mapped(data: Any, function: Callable[..., Any], **options: Any) -> Any:
    """Map batches of rows to new columns in memory; nothing is written to disk."""
    settings = {"batched": True, "remove_columns": data.column_names, "keep_in_memory": True}
    return data.map(function, load_from_cache_file=False, **settings, **options)


def _find(source: Any, task: Task) -> dict[str, Any]:
    """The file, or the rows of the hub, of each split."""
    if not isinstance(source, Path):
        glue = source in ("glue", "nyu-mll/glue")
        loaded = load_hub("nyu-mll/glue" if glue else source, task.name if glue else None)
        return {split.removesuffix("_matched"): _named_classes(rows, task) for split, rows in loaded.items()}
    if source.is_file():
        return {"validation": source}
    found: dict[str, Any] = {}
    for path in sorted(path for path in source.iterdir() if suffix(path) in READERS):
        for split, pattern in _STEMS.items():
            if re.fullmatch(pattern, path.name.removesuffix(".gz").removesuffix(suffix(path))):
                if split in found:
                    raise ValueError(f"data: expected one file of {split} data, got {found[split]} and {path}")
                found[split] = path
    if not found:
        raise FileNotFoundError(f"data: expected train.* and dev.* or validation.* ({', '.join(READERS)}) in {source}")
    return {split: found[split] for split in _STEMS if split in found}


def _named_classes(rows: datasets.Dataset, task: Task) -> list[dict[str, Any]]:
    """Rows with the names of classes in place of indices, where the task has no other names for them."""
    plain = rows.to_list()
    for column in task.label:
        names = getattr(rows.features.get(column), "names", ())
        if names and (not task.labels or set(names) == set(task.labels)):
            for row in plain:
                row[column] = names[row[column]] if row[column] in range(len(names)) else row[column]
    return plain


def _read(path: Path, task: Task) -> list[dict[str, Any]]:
    if suffix(path) == ".json" and task.kind == "qa":
        articles = read_rows(path, field="data")
        try:
            return [
                {**question, "context": paragraph["context"], "answers": _transposed(question)}
                for article in articles
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected SQuAD's data, paragraphs and qas, got {error!r}") from error
    options: dict[str, Any] = {}
    if suffix(path) in (".tsv", ".csv"):
        # As text: "007" and "NA" are words.
        options["converters"] = dict.fromkeys((*task.label, *(name for names in task.text for name in names)), str)
        if task.headerless and not {"sentence"} & set(read_rows(path, nrows=1)[0]):
            options |= {"column_names": list(task.headerless), "header": None}
    rows = read_rows(path, **options)
    if "__index_level_0__" in rows[0]:
        raise ValueError(f"{path}: expected as many columns in a row as in the header, got more")
    if task.skip_short_rows:
        whole = [row for row in rows if _column(str(path), rows, task.label, row) not in ("", None)]
        if len(whole) < len(rows):
            _LOG.warning("%s: left out %d rows that are too short", path, len(rows) - len(whole))
        return whole
    return rows


def _transposed(question: dict[str, Any]) -> dict[str, list[Any]]:
    answers = [] if question.get("is_impossible") else question["answers"]
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


def _column(where: str, rows: list[dict[str, Any]], names: Sequence[str], row: dict[str, Any]) -> Any:
    """The value of the first of these columns that is there."""
    for name in names:
        if name in row:
            return row[name]
    wanted = " or ".join(map(repr, names))
    raise ValueError(f"{where}: expected a column {wanted}, got {', '.join(map(repr, rows[0]))}")


def _normalised(where: str, rows: list[dict[str, Any]], task: Task, split: str) -> datasets.Dataset:
    string = datasets.Value("string")
    if task.kind == "qa":
        texts: dict[str, Sequence[str]] = {name: (name,) for name in ("id", "context", "question")}
    else:
        texts = dict(zip(("text", "text_pair"), task.text, strict=False))
    features: dict[str, Any] = dict.fromkeys(texts, string)
    given = [next((row[name] for name in task.label if name in row), None) for row in rows]
    # Test sets have no labels, or -1 throughout on the hub.
    labelled = not split.startswith("test") or any(value not in (-1, -1.0, None) for value in given)
    target = "answers" if task.kind == "qa" else "label"
    if labelled:
        features[target] = {
            "classification": datasets.ClassLabel(names=list(task.labels)),
            "regression": datasets.Value("float32"),
            "qa": {"text": [string], "answer_start": [datasets.Value("int32")]},
        }[task.kind]
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for number, row in enumerate(rows, 1):
        for name, names in texts.items():
            value = _column(where, rows, names, row)
            if not isinstance(value, str):
                raise ValueError(f"{where}, row {number}: {name}: expected a string, got {value!r}")
            columns[name].append(value)
        if labelled:
            value = _column(where, rows, task.label, row)
            try:
                columns[target].append(convert_label(task, value, row))
            except ValueError as error:
                raise ValueError(f"{where}, row {number}: {error}") from None
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
