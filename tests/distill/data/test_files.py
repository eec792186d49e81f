"""Tasks, and their data from files of every form, on small files written here."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.distill import distill_runs

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
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\n5\t6\ttorn\n1\t2\t3\tc\td\t0\n",
        ["a", "c"],
    ),
}


def write(folder: Path, text: str | bytes, name: str = "dev.tsv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


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


def test_test_set_without_labels(tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path, RELEASES["CoLA"][0], name)
    write(tmp_path, "index\tsentence\n0\tThe cat sat.\n", "test.tsv")
    data = load_task(tmp_path, "cola")
    assert data["test"].column_names == ["text"]
    assert data["test"]["text"][:] == ["The cat sat."]


ROWS = [("good film", "yes"), ('dull, "long" film', "no"), ("007", "yes")]


@pytest.mark.parametrize("form", [".csv", ".csv.gz", ".jsonl", ".json", ".parquet"])
def test_files_of_ones_own_in_every_form(form: str, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        if form == ".parquet":
            columns = {"text": [row[0] for row in ROWS], "label": [row[1] for row in ROWS]}
            datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}{form}")
        elif form.startswith(".json"):
            write(tmp_path, "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS), name + form)
        else:
            text = 'label,text\nyes,good film\nno,"dull, ""long"" film"\nyes,007\n'
            write(tmp_path, gzip.compress(text.encode()) if form.endswith(".gz") else text, name + form)
    data = load_task(tmp_path, custom_task())
    assert data["train"]["text"][:] == [row[0] for row in ROWS]
    assert data["train"]["label"][:] == [1, 0, 1]
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
    path = write(tmp_path, '{"text": "a", "label": 7.5}\n{"text": "b", "label": -1}\n', "scores.jsonl")
    assert load_task(path, custom_task(regression=True))["validation"]["label"][:] == [7.5, -1]
    with pytest.raises(ValueError, match=r"expected at least two classes, got 'a' alone"):
        load_task(write(tmp_path, "text,label\nx,a\n", "one.csv"), custom_task())


SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Cats",
            "paragraphs": [
                {
                    "context": "The cat sat on a mat.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]},
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def test_squad_release(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(SQUAD), "dev-v2.0.json")
    rows = load_task(tmp_path, "squad_v2", ["validation"])["validation"]
    assert rows["answers"][:] == [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    with pytest.raises(ValueError, match=r"row 2: answers: expected at least one for squad, got none"):
        load_task(path, "squad")
    changed = copy.deepcopy(SQUAD)
    # Annotations that are a character or two off are put right; others are errors.
    for start, is_near in ((2, True), (6, True), (1, False), (100, False), (-3, False)):
        changed["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = start
        write(tmp_path, json.dumps(changed), "dev-v2.0.json")
        if is_near:
            assert load_task(path, "squad_v2")["validation"]["answers"][0]["answer_start"] == [4]
        else:
            with pytest.raises(ValueError, match=f"row 1: answers: expected 'cat' at character {start} of the context"):
                load_task(path, "squad_v2")
    rows.to_json(tmp_path / "rows.jsonl")
    assert load_task(tmp_path / "rows.jsonl", "squad_v2")["validation"][:] == rows[:]
    write(tmp_path, '{"data": [{"title": "no paragraphs"}]}', "dev-v2.0.json")
    with pytest.raises(ValueError, match=r"dev-v2.0.json: expected SQuAD's data, paragraphs and qas"):
        load_task(path, "squad_v2")


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("sst2", "dev.tsv", "", r"dev.tsv: cannot be read as csv: No columns"),
        ("sst2", "dev.tsv", "sentence\tlabel\n", r"dev.tsv: expected rows, got none"),
        ("sst2", "dev.tsv", "sentence\tlabel\na\t1\nb\n", r"dev.tsv, row 2: label: expected one of .* got ''"),
        ("sst2", "dev.tsv", "sentence\tlabel\nx\t1\na\tb\t1\n", r"dev.tsv: cannot be read as csv: .* line 3, saw 3"),
        ("sst2", "dev.tsv", "sentence\tlabel\na\tb\t1\n", r"expected as many columns in a row as in the header"),
        ("sst2", "dev.tsv", "text\tlabel\na\t1\n", r"dev.tsv: expected a column 'sentence', got 'text', 'label'"),
        ("sst2", "dev.tsv", "sentence\tlabel\na\t2\n", r"dev.tsv, row 1: label: expected one of negative, positive,"),
        ("sst2", "dev.tsv", b"sentence\tlabel\n\xe9\t1\n", r"dev.tsv: cannot be read as csv: 'utf-8' codec"),
        ("sst2", "dev.jsonl", '{"sentence": "a", "label": 1}\n{"sent', r"dev.jsonl: cannot be read as json"),
        ("sst2", "dev.jsonl", '{"sentence": 3, "label": 1}\n', r"dev.jsonl, row 1: text: expected a string, got 3"),
        ("sst2", "dev.parquet", "no parquet", r"dev.parquet: cannot be read as parquet"),
        (
            "stsb",
            "dev.tsv",
            "sentence1\tsentence2\tscore\na\tb\t5.1\n",
            r"row 1: label: expected a number of 0.0 to 5.0",
        ),
        ("stsb", "dev.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"row 1: label: expected a number of"),
    ],
)
def test_errors_name_the_file_and_the_row(
    task: str, name: str, text: str | bytes, message: str, tmp_path: Path
) -> None:
    write(tmp_path, text, name)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, task, ["validation"])


def test_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"data: expected train.\* and dev.\* or validation.\*"):
        load_task(tmp_path, "sst2")
    write(tmp_path, RELEASES["SST-2"][0])
    with pytest.raises(FileNotFoundError, match=r"data: expected train and validation|expected train data, got valid"):
        load_task(tmp_path, "sst2")
    write(tmp_path, RELEASES["SST-2"][0], "validation.csv")
    with pytest.raises(ValueError, match=r"data: expected one file of validation data, got .*dev.tsv and .*n.csv"):
        load_task(tmp_path, "sst2")
    for absent in (tmp_path / "absent", "./absent", "dev.tsv", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="data: expected a folder, a file or a data set's name, got"):
            load_task(absent, "sst2")

    def cut_off(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", cut_off)
    with pytest.raises(OSError, match=r"data: someone/data is neither .* from the hub: Couldn't reach the hub"):
        load_task("someone/data", "sst2")


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their configuration; classes by their names."""
    asked = []

    def load(name: str, configuration: str, split: str | None) -> Any:
        asked.append((name, configuration))
        names = (
            name.split("/")[1].split("-") if "-" in name.split("/")[1] else ["entailment", "neutral", "contradiction"]
        )
        features = {column: datasets.Value("string") for column in ("premise", "hypothesis", "sentence")}
        features |= {"label": datasets.ClassLabel(names=names)}
        rows = {"premise": ["a"], "hypothesis": ["b"], "sentence": ["c"], "label": [0]}
        labelled = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        hidden = datasets.Dataset.from_dict({**rows, "label": [-1]}, features=datasets.Features(features))
        splits = ("train", "validation_matched", "validation_mismatched")
        return datasets.DatasetDict({**dict.fromkeys(splits, labelled), "test_matched": hidden})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_task("glue", "mnli")
    assert list(data) == ["train", "validation", "validation_mismatched", "test"]
    assert data["validation"][0] == {"text": "a", "text_pair": "b", "label": 0}
    assert data["test"].column_names == ["text", "text_pair"]
    assert load_task("some/positive-negative:part", "sst2")["train"]["label"][:] == [1]
    assert load_task("some/neg-pos", "sst2")["train"]["label"][:] == [0]
    assert asked == [("nyu-mll/glue", "mnli"), ("some/positive-negative", "part"), ("some/neg-pos", None)]


def test_encode(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(distill_runs.save_bert(tmp_path / "bert"))
    text = "index\tsentence1\tsentence2\tlabel\n0\tthe king\ta child\tentailment\n1\tking\tsong\tnot_entailment\n"
    data = load_task(write(tmp_path, text), "rte")["validation"]
    rows = encode(data, tokenizer, get_task("rte"), max_length=6)
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"]]
    assert words[1] == ["[CLS]", "king", "[SEP]", "song", "[SEP]"]
    assert rows["length"][:] == [6, 5]
    assert rows["token_type_ids"][1] == [0, 0, 0, 1, 1]
    assert rows["attention_mask"][1] == [1] * 5
    assert rows["labels"][:] == [0, 1]
    with pytest.raises(ValueError, match="max_length: expected at least 5, got 4"):
        encode(data, tokenizer, get_task("rte"), max_length=4)
