"""Tasks, and their data from files of every form, on small files written here."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.compress.tiny_bert import save_bert

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import (  # noqa: E402
    TASKS,
    Task,
    custom_task,
    encode,
    get_task,
    load_task,
    resolved,
)

RELEASES = {
    "SST-2": ("sentence\tlabel\na \"fine film \t1\nit 's dull \t0\n", ['a "fine film ', "it 's dull "], [1, 0]),
    "CoLA": ("gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the sat.\n", ["The cat sat.", "Cat the sat."], [1, 0]),
    "MRPC": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe said " so .\tSo he said .\n0\t3\t4\ta\t" b\n',
        ['He said " so .', "a"],
        [1, 0],
    ),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n", ["a", "c"], [1, 0]),
    "QNLI": ("index\tquestion\tsentence\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n", ["a", "c"], [1, 0]),
    "WNLI": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n", ["a", "c"], [1, 0]),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta\tb\t5.000\n1\tx\tc\td\t0.25\n",
        ["a", "c"],
        [5, 0.25],
    ),
    "MNLI": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\tneutral\n1\tc\td\tx\tentailment\n",
        "ac",
        [1, 0],
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\n1\t2\t3\tc\td\t0\n", "ac", [1, 0]),
}


def write(folder: Path, text: str | bytes, name: str = "dev.tsv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_release_formats_of_glue(name: str, ends: str, tmp_path: Path) -> None:
    text, first, labels = RELEASES[name]
    for file in ("train.tsv", "dev_matched.tsv" if name == "MNLI" else "dev.tsv"):
        write(tmp_path, text.replace("\n", ends), file)
    data = load_task(tmp_path, name)
    assert list(data) == ["train", "validation"]
    rows = data["validation"]
    assert rows["text"][:] == list(first)
    assert rows["label"][:] == labels
    task = get_task(name)
    assert rows.column_names == ["text", "text_pair", "label"] if task.pair else ["text", "label"]
    if task.kind == "classification":
        assert rows.features["label"].names == list(task.labels)


def test_text_pairs_and_control_characters_stay_whole(tmp_path: Path) -> None:
    write(tmp_path, "index\tsentence1\tsentence2\tlabel\n0\ta\x0bb\x85c\tsecond\tentailment\n\n")
    row = load_task(tmp_path, "rte", ["validation"])["validation"][0]
    assert (row["text"], row["text_pair"]) == ("a\x0bb\x85c", "second")


def test_test_set_without_labels(tmp_path: Path) -> None:
    write(tmp_path, RELEASES["CoLA"][0], "train.tsv")
    write(tmp_path, RELEASES["CoLA"][0], "dev.tsv")
    write(tmp_path, "index\tsentence\n0\tThe cat sat.\n", "test.tsv")
    data = load_task(tmp_path, "cola")
    assert data["test"].column_names == ["text"]
    assert data["test"]["text"][:] == ["The cat sat."]
    write(tmp_path, "index\tsource\n0\tx\n", "dev.tsv")
    with pytest.raises(ValueError, match=r"dev.tsv, line 1: expected 4 columns, got 2"):
        load_task(tmp_path, "cola")


def test_short_rows_of_qqp_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, RELEASES["QQP"][0] + "5\t6\ttorn\n")
    with caplog.at_level(logging.WARNING):
        assert len(load_task(tmp_path, "qqp", ["validation"])["validation"]) == 2
    assert "left out 1 rows with fewer than 6 columns" in caplog.text


ROWS = [("good film", "yes", 1), ('dull, "long" film', "no", 0), ("a film", "yes", 2)]


def write_form(folder: Path, form: str) -> None:
    for name in ("train", "validation"):
        if form == ".parquet":
            columns = {"text": [row[0] for row in ROWS], "label": [row[1] for row in ROWS]}
            folder.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}{form}")
        elif form.startswith(".json"):
            lines = [json.dumps({"text": text, "label": label}) for text, label, _ in ROWS]
            write(folder, "\n".join(lines), name + form)
        else:
            text = 'label,text\nyes,good film\nno,"dull, ""long"" film"\nyes,a film\n'
            data = gzip.compress(text.encode()) if form.endswith(".gz") else text
            write(folder, data, name + form)


@pytest.mark.parametrize("form", [".csv", ".csv.gz", ".jsonl", ".json", ".parquet"])
def test_custom_task_in_every_form(form: str, tmp_path: Path) -> None:
    write_form(tmp_path, form)
    data = load_task(tmp_path, custom_task())
    assert data["train"]["text"][:] == [row[0] for row in ROWS]
    assert data["train"]["label"][:] == [1, 0, 1]
    task = resolved(custom_task(), data)
    assert task.labels == ("no", "yes")
    assert task.num_labels == 2


def test_custom_labels_come_from_the_training_data(tmp_path: Path) -> None:
    write(tmp_path, "a,b,y\nx,y,10\nx,y,9\n", "train.csv")
    write(tmp_path, "a,b,y\nx,z,10\n", "dev.csv")
    task = custom_task(text="a", text_pair="b", label="y")
    data = load_task(tmp_path, task, ["validation"])
    assert list(data) == ["validation"]
    assert data["validation"][0] == {"text": "x", "text_pair": "z", "label": 1}
    assert resolved(task, data).labels == ("9", "10")
    write(tmp_path, "a,b,y\nx,z,8\n", "dev.csv")
    with pytest.raises(ValueError, match=r"dev.csv, line 2: label: expected one of '9', '10', got '8'"):
        load_task(tmp_path, task)


def test_regression_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a", "label": 7.5}\n{"text": "b", "label": -1}\n', "scores.jsonl")
    assert load_task({"train": path}, custom_task(kind="regression"))["train"]["label"][:] == [7.5, -1]


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
    assert rows["title"][:] == ["Cats", "Cats"]
    assert rows["answers"][:] == [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    with pytest.raises(ValueError, match=r"question 2 \(id 2\): answers: expected at least one for squad, got none"):
        load_task(path, "squad")
    damaged = copy.deepcopy(SQUAD)
    for start in (1, 7, -3, 100):
        damaged["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = start
        write(tmp_path, json.dumps(damaged), "dev-v2.0.json")
        with pytest.raises(ValueError, match=rf"\(id 1\): answers: expected 'cat' at character {start} of the context"):
            load_task(path, "squad_v2")
    damaged["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "mat.", "answer_start": -4}]
    write(tmp_path, json.dumps(damaged), "dev-v2.0.json")
    with pytest.raises(ValueError, match=r"answers: expected 'mat.' at character -4 of the context"):
        load_task(path, "squad_v2")
    damaged["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "cat", "answer_start": 0}]
    for start in (2, 3, 5, 6):
        damaged["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = start
        write(tmp_path, json.dumps(damaged), "dev-v2.0.json")
        assert load_task(path, "squad_v2")["validation"]["answers"][0]["answer_start"] == [4]
    rows.to_json(tmp_path / "rows.jsonl")
    assert load_task(tmp_path / "rows.jsonl", "squad_v2")["validation"][:] == rows[:]
    write(tmp_path, '{"data": [{"title": "no paragraphs"}]}', "dev-v2.0.json")
    with pytest.raises(ValueError, match=r"dev-v2.0.json: expected SQuAD's data, paragraphs and qas after 0 questions"):
        load_task(path, "squad_v2")
    write(tmp_path, '{"data":\n [}', "dev-v2.0.json")
    with pytest.raises(ValueError, match=r"dev-v2.0.json, line 2: malformed JSON"):
        load_task(path, "squad_v2")


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("sst2", "dev.tsv", "", r"dev.tsv: expected rows, got none"),
        ("sst2", "dev.tsv", "sentence\tlabel\n", r"dev.tsv: expected rows, got none"),
        ("cola", "dev.tsv", "", r"dev.tsv: expected rows, got none"),
        ("sst2", "dev.tsv", "sentence\tlabel\na\t1\nb\n", r"dev.tsv, line 3: expected 2 columns, got 1"),
        ("sst2", "dev.tsv", "sentence\tlabel\na\tb\t1\n", r"dev.tsv, line 2: expected 2 columns, got 3"),
        ("sst2", "dev.tsv", "label\tlabel\na\tb\n", r"dev.tsv, line 1: expected distinct names of columns, got label"),
        ("sst2", "dev.tsv", "text\tlabel\na\t1\n", r"expected a column 'sentence' for the text, got 'text', 'label'"),
        ("mrpc", "dev.tsv", "#1 String\t#2 String\na\tb\n", r"expected a column 'label' or 'Quality' for the label"),
        ("sst2", "dev.tsv", "sentence\tlabel\na\t2\n", r"dev.tsv, line 2: label: expected a class of 0 to 1, got 2"),
        (
            "sst2",
            "dev.tsv",
            "sentence\tlabel\na\tx\n",
            r"dev.tsv, line 2: label: expected one of 'negative', 'positive'",
        ),
        ("sst2", "dev.tsv", b"sentence\tlabel\n\xe9\t1\n", r"dev.tsv, line 2: expected UTF-8 text, got"),
        ("sst2", "dev.csv", 'sentence,label\n"a"b,1\n', r"dev.csv, line 2: expected CSV, got"),
        ("sst2", "dev.jsonl", '{"sentence": "a", "label": 1}\n{"sent', r"dev.jsonl, line 2: malformed JSON, "),
        ("sst2", "dev.jsonl", "[1]\n", r"dev.jsonl, line 1: expected a JSON object a line, got list"),
        ("sst2", "dev.jsonl", '{"sentence": 3, "label": 1}\n', r"dev.jsonl, line 1: text: expected a string, got 3"),
        ("sst2", "dev.jsonl", '{"sentence": "a", "label": NaN}\n', r"line 1: label: expected one of .*, got 'nan'"),
        ("sst2", "dev.jsonl", '{"a": 1}\n{"b": 1}\n', r"line 2: expected the columns of the first line, a, got b"),
        ("sst2", "dev.parquet", "no parquet", r"dev.parquet: expected a parquet file, got"),
        (
            "sst2",
            "dev.tsv.gz",
            gzip.compress(b"sentence\tlabel\n")[:-9],
            r"line 0: expected a whole gzip file|after line",
        ),
        (
            "stsb",
            "dev.tsv",
            "sentence1\tsentence2\tscore\na\tb\t5.1\n",
            r"line 2: label: expected a number of 0.0 to 5.0",
        ),
        ("stsb", "dev.tsv", "sentence1\tsentence2\tscore\na\tb\tx\n", r"line 2: label: expected a number, got 'x'"),
        ("stsb", "dev.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"label: expected a finite number, got 'nan'"),
        (
            "squad",
            "dev.jsonl",
            '{"id": "1", "context": "c", "question": "q", "answers": 3}',
            r"expected lists text and",
        ),
    ],
)
def test_errors_name_file_and_line(task: str, name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path, text, name)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, task, ["validation"])


def test_one_class_alone_is_no_classification(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\na,1\n", "dev.csv")
    with pytest.raises(ValueError, match=r"dev.csv: expected at least two classes, got '1' alone"):
        load_task(path, custom_task())


def test_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"source: expected train.\* and dev.\* or validation.\*"):
        load_task(tmp_path, "sst2")
    path = write(tmp_path, RELEASES["SST-2"][0])
    with pytest.raises(FileNotFoundError, match=r"source: expected train data, got validation in"):
        load_task(tmp_path, "sst2")
    write(tmp_path, RELEASES["SST-2"][0], "validation.csv")
    with pytest.raises(ValueError, match=r"source: expected one file of validation data, got .*dev.tsv and .*n.csv"):
        load_task(tmp_path, "sst2")
    with pytest.raises(ValueError, match=r"source: expected splits of train, .*, got 'dev'"):
        load_task({"dev": path}, "sst2")
    with pytest.raises(FileNotFoundError, match="source: expected a file, got absent"):
        load_task({"train": "absent"}, "sst2")
    for absent in (tmp_path / "absent", "./absent", "dev.tsv", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="source: expected a folder, a file or a data set's name, got"):
            load_task(absent, "sst2")
    with pytest.raises(ValueError, match=r"source: expected a file of .tsv, .csv"):
        load_task(write(tmp_path, "x", "dev.xlsx"), "sst2")

    def cut_off(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", cut_off)
    with pytest.raises(
        OSError, match=r"source: someone/data is neither a local folder or file nor .* Couldn't reach the"
    ):
        load_task("someone/data", "sst2")


def test_hub_data_sets_are_asked_for_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )
    asked = []

    def load(name: str, configuration: str, split: str | None) -> Any:
        asked.append((name, configuration, split))
        rows = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
        labelled = datasets.Dataset.from_dict(rows, features=features)
        hidden = datasets.Dataset.from_dict({**rows, "label": [-1]}, features=features)
        names = ("train", "validation_matched", "validation_mismatched")
        return datasets.DatasetDict({**dict.fromkeys(names, labelled), "test_matched": hidden})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_task("glue", "mnli")
    assert list(data) == ["train", "validation", "validation_mismatched", "test"]
    assert data["validation"][0] == {"text": "a", "text_pair": "b", "label": 2}
    assert data["test"].column_names == ["text", "text_pair"]
    load_task("someone/data:part", "mnli")
    assert asked == [("nyu-mll/glue", "mnli", None), ("someone/data", "part", None)]


def test_classes_of_the_hub_go_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(first: str, *_: Any, **__: Any) -> Any:
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=first.split("-"))}
        rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [0]}, features=datasets.Features(features))
        return datasets.DatasetDict({"train": rows, "validation": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_task("positive-negative", "sst2")["train"]["label"][:] == [1]
    assert load_task("neg-pos", "sst2")["train"]["label"][:] == [0]
    with pytest.raises(ValueError, match="spam-ham/train: expected at least two classes, got 'spam' alone"):
        load_task("spam-ham", custom_task(text="sentence"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("words") / "bert"))


def test_encode(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, "index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta dog\tentailment\n1\tcat\tdog\tnot_entailment\n")
    data = load_task(tmp_path, "rte", ["validation"])
    rows = encode(data, tokenizer, "rte", max_length=6)["validation"]
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"]]
    assert words[1] == ["[CLS]", "cat", "[SEP]", "dog", "[SEP]"]
    assert len(words[0]) == 6
    assert rows["length"][:] == [6, 5]
    assert rows["token_type_ids"][1] == [0, 0, 0, 1, 1]
    assert rows["attention_mask"][1] == [1] * 5
    assert rows["labels"][:] == [0, 1]
    data.save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    stored = datasets.load_from_disk(tmp_path / "saved")["validation"]
    assert encode(stored, tokenizer, "rte", max_length=6)[:] == rows[:]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="max_length: expected at least 5, got 4"):
        encode(data, tokenizer, "rte", max_length=4)
    with pytest.raises(ValueError, match="task: expected classification or regression, got question answering"):
        encode(data, tokenizer, "squad")


def test_names_of_tasks() -> None:
    assert get_task("SST-2") is get_task("sst2")
    assert get_task("STS_B").name == "stsb"
    assert get_task("squad-v1.1").name == "squad"
    assert get_task("SQuAD v2.0").name == get_task("squad_v2").name == "squad_v2"
    assert get_task(get_task("rte")) is get_task("rte")
    assert {get_task(name).name for name in TASKS} == set(TASKS)
    with pytest.raises(ValueError, match=r"task: expected one of sst2, cola, .*, got 'sst3'"):
        get_task("sst3")


def test_main_metrics() -> None:
    mains = {name: get_task(name).main for name in TASKS}
    assert mains == {
        **dict.fromkeys(("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"), "accuracy"),
        "cola": "matthews",
        "stsb": "spearman",
        "squad": "f1",
        "squad_v2": "f1",
    }
    assert [get_task(name).num_labels for name in ("sst2", "mnli", "stsb", "squad")] == [2, 3, 1, 2]


def test_custom_task_metrics() -> None:
    assert custom_task(kind="regression").main == "spearman"
    assert custom_task().metrics == ("accuracy",)
    assert custom_task(metrics=["f1", "accuracy"]).main == "f1"
    assert custom_task(kind="regression", metrics=["pearson"]).main == "pearson"
    assert custom_task(metrics=["f1", "accuracy"], main="accuracy").main == "accuracy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "qa"}, "kind: expected 'classification' or 'regression' for a custom task, got 'qa'"),
        (
            {"metrics": ["pearson"]},
            "metrics: expected some of 'accuracy', 'f1', 'matthews' for classification, got 'pea",
        ),
        ({"metrics": "f1"}, "labels, metrics: expected sequences of names, got one string"),
        ({"main": "f1"}, "main: expected one of the metrics, 'accuracy', got 'f1'"),
        ({"labels": ["a", "a"]}, "labels: expected distinct names, got 'a', 'a'"),
        ({"labels": ["a"]}, "labels: expected two or more for a classification alone, got 'a'"),
        ({"kind": "regression", "labels": ["a", "b"]}, "labels: expected two or more for a classification alone"),
    ],
)
def test_custom_tasks_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        custom_task(**options)


def test_tasks_that_do_not_fit() -> None:
    task: Task = get_task("sst2")
    with pytest.raises(ValueError, match="kind: expected one of 'classification', 'regression', 'qa', got 'ranking'"):
        dataclasses.replace(task, kind="ranking")
    with pytest.raises(ValueError, match="text: expected one or two columns, got 0"):
        dataclasses.replace(task, text=())
