"""Tasks, and their data from files of every form, on small files written here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import custom_task, encode, get_task, load_task, resolved  # noqa: E402

RELEASES = {
    "SST-2": ("sentence\tlabel\n\"a fine film \t1\nit 's \x0bd\x85ull \t0\n", ['"a fine film ', "it 's \x0bd\x85ull "]),
    "CoLA": ("gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the sat.\n", ["The cat sat.", "Cat the sat."]),
    "MRPC": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe said " so .\tSo he said .\n0\t3\t4\t7\tNA\n',
        ['He said " so .', "7"],
    ),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n", ["a", "c"]),
    "STS-B": ("index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta\tb\t1.000\n1\tx\tc\td\t0\n", ["a", "c"]),
    "MNLI": ("index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n1\tc\td\tentailment\n", ["a", "c"]),
    "QQP": ("id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n5\ttorn\n1\tc\td\t0\n", ["a", "c"]),
}


NAMES = ["sst2", "stsb", "squad", "squad_v2"]


def write(folder: Path, text: str, name: str = "dev.tsv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def test_names_of_tasks() -> None:
    assert [get_task(name).name for name in ("SST-2", "STS_B", "squad-v1.1", "SQuAD v2.0")] == NAMES
    with pytest.raises(ValueError, match=r"task: expected one of sst2, cola, .*, or custom, got 'sst3'"):
        get_task("sst3")


@pytest.mark.parametrize("name", RELEASES)
def test_release_formats_of_glue(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, first = RELEASES[name]
    write(tmp_path, text, "train.tsv")
    write(tmp_path, text.replace("\n", "\r\n"), "dev_matched.tsv" if name == "MNLI" else "dev.tsv")
    data = load_task(tmp_path, name)
    assert list(data) == ["train", "validation"]
    task = get_task(name)
    for rows in data.values():
        assert rows["text"][:] == first
        assert rows["label"][:] == [1, 0]
        assert rows.column_names == ["text", "text_pair", "label"] if task.pair else ["text", "label"]
        assert task.kind == "regression" or rows.features["label"].names == list(task.labels)
    assert ("left out 1 rows that are too short" in caplog.text) == (name == "QQP")


TEXTS = ["good film", 'dull, "long" film', "007"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, ("yes", "no", "yes"), strict=True)]


@pytest.mark.parametrize("form", ["csv.gz", "jsonl", "parquet"])
def test_files_of_ones_own_in_every_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"dev.{form}"
    rows = datasets.Dataset.from_list(ROWS)
    if form == "parquet":
        rows.to_parquet(path)
    elif form == "jsonl":
        rows.to_json(path)
    else:
        path.write_bytes(gzip.compress(b'label,text\nyes,good film\nno,"dull, ""long"" film"\nyes,007\n'))
    data = load_task(path, custom_task())
    assert data["validation"]["text"][:] == rows["text"][:]
    assert data["validation"]["label"][:] == [1, 0, 1]
    assert resolved(custom_task(), data).labels == ("no", "yes")


def test_classes_come_from_the_training_data_and_numbers_may_be_labels(tmp_path: Path) -> None:
    write(tmp_path, "a,b,y\nx,y,10\nx,y,9\n", "train.csv")
    write(tmp_path, "a,b,y\nx,z,10\n", "dev.csv")
    task = custom_task("a", "b", "y")
    data = load_task(tmp_path, task, ["validation"])
    assert data["validation"][0] == {"text": "x", "text_pair": "z", "label": 1}
    assert resolved(task, data).labels == ("9", "10")
    write(tmp_path, "a,b,y\nx,z,8\n", "dev.csv")
    with pytest.raises(ValueError, match=r"dev.csv, row 1: label: expected one of 9, 10, or their index, got '8'"):
        load_task(tmp_path, task)


def test_squad_release(tmp_path: Path) -> None:
    def release(start: int) -> Path:
        answered = {"id": "1", "question": "Who?", "answers": [{"text": "cat", "answer_start": start}]}
        questions = [answered, {"id": "2", "question": "Why?", "answers": [], "is_impossible": True}]
        paragraphs = [{"context": "The cat sat on a mat.", "qas": questions}]
        document = {"version": "v2.0", "data": [{"title": "Cats", "paragraphs": paragraphs}]}
        return write(tmp_path, json.dumps(document), "dev-v2.0.json")

    for start in (4, 2, 6):  # annotations that are a character or two off are put right
        release(start)
        rows = load_task(tmp_path, "squad_v2", ["validation"])["validation"]
        assert rows["answers"][:] == [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    with pytest.raises(ValueError, match="row 1: answers: expected 'cat' at character 1 of the context"):
        load_task(release(1), "squad_v2")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dev.tsv", "sentence\tlabel\na\t1\nb\n", r"dev.tsv, row 2: label: expected one of .* got ''"),
        ("dev.tsv", "text\tlabel\na\t1\n", r"dev.tsv: expected a column 'sentence', got 'text', 'label'"),
        ("dev.jsonl", '{"sent', r"dev.jsonl: cannot be read as json"),
    ],
)
def test_errors_name_the_file_and_the_row(name: str, text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, text, name)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, "sst2", ["validation"])


def test_sources_of_the_hub_and_those_that_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By configuration, classes by their names."""
    with pytest.raises(FileNotFoundError, match=r"data: expected train.\* and dev.\* or validation.\*"):
        load_task(tmp_path, "sst2")
    asked = []

    def load(name: str, configuration: str, split: str | None) -> Any:
        asked.append((name, configuration))
        names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        string = datasets.Value("string")
        features = datasets.Features({"premise": string, "hypothesis": string, "label": names})
        shown, hidden = (
            datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": [label]}, features=features)
            for label in (1, -1)
        )
        splits = ("train", "validation_matched", "validation_mismatched")
        return datasets.DatasetDict({**dict.fromkeys(splits, shown), "test_matched": hidden})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_task("glue", "mnli")
    assert list(data) == ["train", "validation", "validation_mismatched", "test"]
    assert data["validation"].features["label"].int2str(data["validation"][0]["label"]) == "neutral"
    assert data["test"].column_names == ["text", "text_pair"]
    assert asked == [("nyu-mll/glue", "mnli")]


def test_encode(tmp_path: Path, tokenizer: Any) -> None:
    text = "index\tsentence1\tsentence2\tlabel\n0\tthe king\ta child\tentailment\n1\tking\tsong\tnot_entailment\n"
    data = load_task(write(tmp_path, text), "rte")["validation"]
    rows = encode(data, tokenizer, get_task("rte"), max_length=6)
    assert tokenizer.convert_ids_to_tokens(rows["input_ids"][1]) == ["[CLS]", "king", "[SEP]", "song", "[SEP]"]
    assert (rows["length"][:], rows["token_type_ids"][1], rows["labels"][:]) == ([6, 5], [0, 0, 0, 1, 1], [0, 1])
