"""The example of distillation on a tiny random BERT and generated sentences."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.distill import distill_runs

pytest.importorskip("accelerate", reason="the extra 'distill' is not installed")
pytest.importorskip("datasets", reason="the extra 'distill' is not installed")

from kron_kernels.distill import RunFolder, prepare

EXAMPLES = Path(__file__).parents[2] / "examples"
REVIEWS = [(text, ("negative", "positive")[label]) for text, label in distill_runs.sentences(150, 5)]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("distill")


def test_data_are_split_and_the_same_every_time(example: ModuleType, tmp_path: Path) -> None:
    example.save_data(tmp_path / "data", REVIEWS, 30)
    files = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    example.save_data(tmp_path / "data", REVIEWS, 30)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == files
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train.jsonl": 120, "validation.jsonl": 30}
    found = [(row["text"], row["label"]) for each in rows.values() for row in each]
    assert sorted(found) == sorted(REVIEWS)
    assert found != REVIEWS


@pytest.mark.slow
def test_teacher_and_students_are_trained_and_reported_once(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The warm start takes 300 steps a block.
    monkeypatch.setattr(prepare, "start_model", functools.partial(prepare.start_model, steps=3))
    bert = distill_runs.save_bert(tmp_path / "bert")
    out = tmp_path / "out"
    flags = ["--out", str(out), "--examples", "64", "--teacher-epochs", "2", "--epochs", "1", "--compare"]
    report = example.distill(bert, REVIEWS, example.parse(flags), held_out=30)
    labels = [line.model for line in report.lines]
    assert sorted(labels) == ["K8", "K8, labels alone", "teacher"]
    assert labels[0] == "teacher"
    assert report.tasks == ["custom"]
    assert not report.unfinished
    folders = ["teacher", "K8", "K8-labels-alone"]
    steps = {name: json.loads((out / name / "result.json").read_text())["result"]["steps"] for name in folders}
    assert steps == {"teacher": 4, **dict.fromkeys(folders[1:], 2)}
    # The students begin from one start; what differs is what they learn from.
    distilled, alone = (RunFolder(out / name).config for name in folders[1:])
    assert distilled["preset"] == "K8"
    assert (alone["student"], alone["preset"]) == (str(out / "K8" / "start"), None)
    for term in ("embedding", "scores", "ffn", "logits", "supervised"):
        assert distilled["losses"][term] == 1
        assert alone["losses"][term] == (term == "supervised")
    assert {"report.md", "table.png"} <= {path.name for path in out.iterdir()}
    assert "| K8, labels alone |" in (out / "report.md").read_text()

    # Started again it has nothing to do; asked for something else, it says so.
    before = {name: (out / name / "result.json").stat().st_mtime_ns for name in folders}
    assert example.distill(bert, REVIEWS, example.parse(flags), held_out=30).lines == report.lines
    assert {name: (out / name / "result.json").stat().st_mtime_ns for name in folders} == before
    monkeypatch.setattr(example, "encoder_folder", lambda: bert)
    monkeypatch.setattr(example, "reviews", lambda: REVIEWS)
    monkeypatch.setattr("sys.argv", ["distill", *flags, "--examples", "32"])
    monkeypatch.setattr(example, "HELD_OUT", 30)
    assert example.main() == 2
