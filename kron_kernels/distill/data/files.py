"""A task's data from a folder, files or the hub, in one form; and its tokens."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from .sources import hub_name, load_hub
from .tables import (
    SUFFIXES,
    Table,
    column,
    read_table,
    strings,
    suffix,
)
from .tasks import Task, class_index, class_names, get_task, score

Source = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]

# What the files of each split may be called, apart from the suffix. The validation set of MNLI is the matched one.
_STEMS = {
    "train": r"train(-v\d\.\d)?",
    "validation": r"(dev|valid|validation)(_matched|-v\d\.\d)?",
    "validation_mismatched": r"(dev|valid|validation)_mismatched",
    "test": r"test(_matched|-v\d\.\d)?",
    "test_mismatched": r"test_mismatched",
}


def load_task(source: Source, task: str | Task, splits: Sequence[str] | None = None) -> datasets.DatasetDict:
    """The data of a task, each split with the columns that all tasks share.

    Columns: ``text``, ``text_pair`` (tasks of two texts) and ``label``, a class label with the names of the classes or
    a float. Question answering: ``id``, ``title``, ``context``, ``question`` and ``answers`` (a dict of two lists,
    ``text`` and ``answer_start`` in characters). A test set without labels has no ``label``.

    Args:
        source: a local folder with ``train.*`` and ``dev.*`` or ``validation.*`` (and ``test.*``) as .tsv, .csv,
            .jsonl, .json (a JSON object a line, or SQuAD's release) or .parquet; a mapping from splits to files; one
            file, taken as the validation set; or a dataset's name on the hub ("glue" for GLUE), with
            ``:configuration`` where it has several.
        task: a task or its name. Classes without names are those found in the training set (without one, in the rest).
        splits: the splits to read, which must be there; by default train and validation, with the others if present.

    Raises:
        OSError: a source that is not there, or that could not be downloaded.
        ValueError: a file that is not as expected; the message names file and line.
    """
    task = get_task(task)
    found, complete = _find(source, task)
    required = splits or (("train", "validation") if complete else ())
    if missing := [split for split in required if split not in found]:
        raise FileNotFoundError(f"source: expected {' and '.join(missing)} data, got {', '.join(found)} in {source}")
    kept = list(splits or found)
    from_train = task.kind == "classification" and not task.labels and "train" in found
    read = {
        split: read_table(table, task) if isinstance(table, Path) else table
        for split, table in found.items()
        if split in kept or (from_train and split == "train")
    }
    if task.kind == "classification" and not task.labels:
        named = [read["train"]] if from_train else list(read.values())
        task = dataclasses.replace(task, labels=_found_names(named, task))
    return datasets.DatasetDict({split: _normalised(read[split], task, split) for split in kept})


def resolved(task: str | Task, data: datasets.DatasetDict) -> Task:
    """The task with the names of the classes that :func:`load_task` found, if it had none."""
    task = get_task(task)
    if task.kind != "classification" or task.labels:
        return task
    feature = next(split.features["label"] for split in data.values() if "label" in split.features)
    return dataclasses.replace(task, labels=tuple(feature.names))


def encode(data: Any, tokenizer: Any, task: str | Task, max_length: int = 128) -> Any:
    """Token ids of a Dataset or DatasetDict of :func:`load_task`, without padding.

    Columns: ``input_ids``, ``token_type_ids`` and ``attention_mask`` (lists of ``length`` integers), ``length``, and
    ``labels`` where there is a label. Longer inputs are cut to ``max_length`` tokens, special tokens included; of a
    pair the longer text first. Nothing is written to disk.

    Raises ValueError for question answering (see :func:`~.squad.qa_features`) and a ``max_length`` without room for
    text.
    """
    task = get_task(task)
    if task.kind == "qa":
        raise ValueError("task: expected classification or regression, got question answering; use qa_features")
    least = tokenizer.num_special_tokens_to_add(task.pair) + len(task.text)
    if max_length < least:
        raise ValueError(f"max_length: expected at least {least}, got {max_length}")

    def tokenized(batch: dict[str, list[Any]]) -> dict[str, Any]:
        tokens = tokenizer(
            batch["text"],
            batch["text_pair"] if task.pair else None,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=True,
        )
        columns = {name: tokens[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        if "label" in batch:
            columns["labels"] = batch["label"]
        return columns

    if isinstance(data, datasets.DatasetDict):
        return datasets.DatasetDict({split: encode(rows, tokenizer, task, max_length) for split, rows in data.items()})
    return data.map(
        tokenized, batched=True, remove_columns=data.column_names, keep_in_memory=True, load_from_cache_file=False
    )


def _find(source: Source, task: Task) -> tuple[dict[str, Path | Table], bool]:
    """The file or table of each split, and whether the source should have both train and validation data."""
    if isinstance(source, Mapping):
        if unknown := [split for split in source if split not in _STEMS]:
            raise ValueError(f"source: expected splits of {', '.join(_STEMS)}, got {unknown[0]!r}")
        found: dict[str, Path | Table] = {split: Path(path) for split, path in source.items()}
        for path in found.values():
            if isinstance(path, Path) and not path.is_file():
                raise FileNotFoundError(f"source: expected a file, got {path}")
        return found, False
    path = Path(source)
    if path.is_file():
        return {"validation": path}, False
    if path.is_dir():
        return _folder(path), True
    return _hub(hub_name("source", source), task), True


def _folder(folder: Path) -> dict[str, Path | Table]:
    found: dict[str, Path | Table] = {}
    paths = [path for path in sorted(folder.iterdir()) if suffix(path) in SUFFIXES]
    for split, pattern in _STEMS.items():
        for path in paths:
            if re.fullmatch(pattern, path.name.removesuffix(".gz").removesuffix(suffix(path))):
                if split in found:
                    raise ValueError(f"source: expected one file of {split} data, got {found[split]} and {path}")
                found[split] = path
    if not found:
        raise FileNotFoundError(
            f"source: expected train.* and dev.* or validation.* ({', '.join(SUFFIXES)}) in {folder}"
        )
    return found


def _hub(source: str, task: Task) -> dict[str, Path | Table]:
    glue = source in ("glue", "nyu-mll/glue")
    loaded = load_hub("source", "nyu-mll/glue" if glue else source, task.name if glue else None)
    return {
        split.removesuffix("_matched"): Table(
            f"{source}/{split}", _named_classes(rows, task), range(1, len(rows) + 1), "row"
        )
        for split, rows in loaded.items()
    }


def _named_classes(rows: datasets.Dataset, task: Task) -> dict[str, list[Any]]:
    """Columns with the names of classes in place of indices, where the task has no other names for them."""
    columns = rows.to_dict()
    for name in task.label:
        names = getattr(rows.features.get(name), "names", ())
        if names and (not task.labels or set(names) == set(task.labels)):
            columns[name] = [names[index] if index in range(len(names)) else index for index in columns[name]]
    return columns


def _found_names(tables: Sequence[Table], task: Task) -> tuple[str, ...]:
    names = class_names([value for table in tables for value in column(table, task.label, "label")])
    if len(names) < 2:
        raise ValueError(f"{tables[0].path}: expected at least two classes, got {', '.join(map(repr, names))} alone")
    return names


def _normalised(table: Table, task: Task, split: str) -> datasets.Dataset:
    if task.kind == "qa":
        return _questions(table, task)
    columns: dict[str, list[Any]] = {}
    features: dict[str, Any] = {}
    for name, names in zip(("text", "text_pair"), task.text, strict=False):
        columns[name] = strings(table, column(table, names, name), name)
        features[name] = datasets.Value("string")
    if not _unlabelled(table, task, split):
        convert = class_index if task.kind == "classification" else score
        columns["label"] = [
            _at(table, row, convert, task, value) for row, value in enumerate(column(table, task.label, "label"))
        ]
        names_of = task.kind == "classification"
        features["label"] = datasets.ClassLabel(names=list(task.labels)) if names_of else datasets.Value("float32")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _unlabelled(table: Table, task: Task, split: str) -> bool:
    """Whether this is a test set without labels: no such column, or -1 throughout, as on the hub."""
    if not split.startswith("test"):
        return False
    values = next((table.columns[name] for name in task.label if name in table.columns), None)
    return values is None or all(value in (-1, -1.0, None) for value in values)


def _at(table: Table, row: int, convert: Any, task: Task, value: Any) -> Any:
    try:
        return convert(task, value)
    except ValueError as error:
        raise ValueError(f"{table.where(row)}: {error}") from None


def _questions(table: Table, task: Task) -> datasets.Dataset:
    """The columns of question answering, each answer checked against its context."""
    columns: dict[str, list[Any]] = {
        name: strings(table, column(table, (name,), name), name) for name in ("id", "context", "question")
    }
    columns["title"] = table.columns.get("title", [""] * len(table.lines))
    columns["answers"] = list(column(table, task.label, "answers"))
    for row, (context, answers) in enumerate(zip(columns["context"], columns["answers"], strict=True)):
        try:
            columns["answers"][row] = _checked_answers(task, context, answers)
        except ValueError as error:
            raise ValueError(f"{table.where(row)} (id {columns['id'][row]}): {error}") from None
    string = datasets.Value("string")
    features = dict.fromkeys(("id", "title", "context", "question"), string)
    answers_feature = {"text": [string], "answer_start": [datasets.Value("int32")]}
    return datasets.Dataset.from_dict(
        {name: columns[name] for name in (*features, "answers")},
        features=datasets.Features({**features, "answers": answers_feature}),
    )


def _checked_answers(task: Task, context: str, answers: Any) -> dict[str, list[Any]]:
    """The answers, each where its text is: some annotations are a character or two off."""
    try:
        pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        if not all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"answers: expected lists text and answer_start of one length, got {answers!r}") from None
    if not pairs and not task.no_answer:
        raise ValueError(f"answers: expected at least one for {task.name}, got none")
    starts = []
    for text, start in pairs:
        found = next((start + shift for shift in (0, -1, 1, -2, 2) if _is_at(context, text, start + shift)), None)
        if found is None:
            raise ValueError(
                f"answers: expected {text!r} at character {start} of the context, "
                f"got {context[max(start, 0) : max(start, 0) + len(text)]!r}"
            )
        starts.append(found)
    return {"text": [text for text, _ in pairs], "answer_start": starts}


def _is_at(context: str, text: str, start: int) -> bool:
    return start >= 0 and context.startswith(text, start)
