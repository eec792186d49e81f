"""The score of dense and KronBert models on a task, and the command, on tiny random models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kron_kernels.cli import main
from kron_kernels.compress import compress
from tests.compress.tiny_bert import WORDS, save_bert

pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import compute_metrics
from kron_kernels.distill.evaluate import evaluate

Capture = pytest.CaptureFixture[str]
PAIRS = [(left, right) for left in WORDS for right in WORDS][::4]
TEXTS = [" ".join([left] * (1 + index % 7) + [right]) for index, (left, right) in enumerate(PAIRS)]


LABELS = torch.randint(2, (len(TEXTS),), generator=torch.Generator().manual_seed(3)).tolist()


def save_classifier(folder: Path, **config: Any) -> Path:
    """A tiny BERT with a head; one of two classes predicts each for half of the texts."""
    save_bert(folder, transformers.BertForSequenceClassification)
    settings = transformers.BertConfig.from_pretrained(folder, initializer_range=0.5, **config)
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification(settings)
    model.save_pretrained(folder)
    if settings.num_labels == 2:
        logits = logits_one_by_one(folder)
        model.classifier.bias.data[0] += (logits[:, 1] - logits[:, 0]).median() + 1e-3  # no tie
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("dense") / "bert")


@pytest.fixture(scope="module")
def kron(dense: Path) -> Path:
    compress(dense, dense.parent / "kron", "K8")
    return dense.parent / "kron"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sst2")
    rows = [f"{text}\t{label}" for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


@torch.no_grad()
def logits_one_by_one(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


@pytest.mark.parametrize("name", ["dense", "kron"])
def test_score_is_that_of_the_texts_one_by_one(name: str, data: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    logits = logits_one_by_one(folder)
    result = evaluate(folder, "SST-2", data, batch_size=8)
    assert result.metrics == compute_metrics("sst2", logits, LABELS)
    assert (result.task, result.split, result.main, result.examples) == ("sst2", "validation", "accuracy", len(TEXTS))
    assert result.score == result.metrics["accuracy"]


def test_a_model_in_memory_is_left_as_it_was(dense: Path, data: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(dense).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    result = evaluate(model, "sst2", data, tokenizer=tokenizer, device="cpu")
    assert result.metrics == evaluate(dense, "sst2", data).metrics
    assert model.training


def test_classes_of_the_model_in_another_order(dense: Path, data: Path, tmp_path: Path) -> None:
    plain = evaluate(dense, "sst2", data).score
    for names, wanted in ((["Positive", "NEGATIVE"], 100 - plain), ("xy", plain)):
        shutil.copytree(dense, tmp_path / "named", dirs_exist_ok=True)
        config = json.loads((dense / "config.json").read_text())
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        (tmp_path / "named" / "config.json").write_text(json.dumps(config))
        assert evaluate(tmp_path / "named", "sst2", data).score == pytest.approx(wanted, abs=1e-4)


def test_regression(tmp_path: Path, capsys: Capture) -> None:
    folder = save_classifier(tmp_path / "regressor", num_labels=1)
    rows = [f"{text},{index / 10},{index}" for index, text in enumerate(TEXTS)]
    (tmp_path / "dev.csv").write_text("\n".join(["a,b,y", *rows]))
    arguments = ["--task", "custom", "--regression", "--text", "a", "--label", "y", "--data", str(tmp_path)]
    assert main(["evaluate", str(folder), *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = compute_metrics("stsb", logits_one_by_one(folder), [float(index) for index in range(len(TEXTS))])
    assert result["metrics"] == pytest.approx(expected, abs=1e-3)


def test_question_answering(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "reader", transformers.BertForQuestionAnswering)
    context = " ".join(WORDS[2:])  # no articles, which do not count in an answer
    row = {"question": "the cat", "context": context, "answers": {"text": [], "answer_start": []}}
    (tmp_path / "dev.jsonl").write_text("\n".join(json.dumps({"id": f"{index}", **row}) for index in range(5)))
    model = transformers.BertForQuestionAnswering.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    hidden = model.bert(**tokenizer("the cat", context, return_tensors="pt")).last_hidden_state[0, 0].detach()
    # With its hidden state as the weight of the head, [CLS] is the most likely start and end; negated, the least.
    for sign, wanted in ((1, 100.0), (-1, 0.0)):
        model.qa_outputs.weight.data = sign * torch.stack([hidden, hidden])
        result = evaluate(model, "squad_v2", tmp_path, tokenizer=tokenizer, batch_size=2)
        assert result.metrics == {"exact_match": wanted, "f1": wanted}


def test_command_prints_a_table_and_writes_a_file(kron: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "result.json"
    arguments = ["evaluate", str(kron), "--task", "sst2", "--data", str(data / "dev.tsv"), "--out", str(out)]
    assert main([*arguments, "--batch-size", "7", "--max-length", "6", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    saved = json.loads(out.read_text())
    assert f"accuracy    {saved['metrics']['accuracy']:.2f}  *" in captured.out
    assert saved["metrics"] == evaluate(kron, "sst2", data, max_length=6).metrics


def test_bad_input_is_one_clear_line(
    dense: Path, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(message: str, model: Path, *flags: str) -> None:
        assert main(["evaluate", str(model), "--task", "sst2", "--data", str(data), *flags]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("kron-kernels evaluate: error: ")
        assert message in last

    check("expected train data, got validation", dense, "--split", "train")
    check("max_length: expected at most the model's 24 positions, got 25", dense, "--max-length", "25")
    check("expected a checkpoint of BertForSequenceClassification", save_bert(tmp_path / "headless"))
    for name in [name for name in sys.modules if name.startswith(("kron_kernels.distill", "torchmetrics."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    check("the library 'torchmetrics' is not installed: pip install 'kron_kernels[distill]'", dense)
