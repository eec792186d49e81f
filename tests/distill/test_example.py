"""The example of distillation on a tiny random BERT and generated sentences."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import pytest

from tests.distill import distill_runs

pytest.importorskip("accelerate", reason="the extra 'distill' is not installed")
pytest.importorskip("datasets", reason="the extra 'distill' is not installed")

from kron_kernels.distill import RunFolder, prepare

REVIEWS = [(text, ("negative", "positive")[label]) for text, label in distill_runs.sentences(150, 5)]


@pytest.mark.slow
def test_teacher_and_students_are_trained_and_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    example = importlib.import_module("distill")
    # The warm start takes 300 steps a block.
    monkeypatch.setattr(prepare, "start_model", functools.partial(prepare.start_model, steps=3))
    bert = distill_runs.save_bert(tmp_path / "bert")
    out = tmp_path / "out"
    flags = ["--out", str(out), "--examples", "64", "--teacher-epochs", "2", "--epochs", "1", "--compare"]
    report = example.distill(bert, REVIEWS, example.parse(flags), held_out=30)
    assert sorted(line.model for line in report.lines) == ["K8", "K8, labels alone", "teacher"]
    folders = ["teacher", "K8", "K8-labels-alone"]
    steps = {name: json.loads((out / name / "result.json").read_text())["result"]["steps"] for name in folders}
    assert steps == {"teacher": 4, **dict.fromkeys(folders[1:], 2)}
    # The students begin from one start; what differs is what they learn from.
    distilled, alone = (RunFolder(out / name).config for name in folders[1:])
    assert (alone["student"], alone["preset"]) == (str(out / "K8" / "start"), None)
    for term in ("embedding", "scores", "ffn", "logits", "supervised"):
        assert distilled["losses"][term] == 1
        assert alone["losses"][term] == (term == "supervised")
