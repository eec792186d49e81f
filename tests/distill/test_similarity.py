"""The score of a sentence encoder on pairs of texts: cosines of its vectors, one pair at a time, give the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("datasets", reason="the extra 'distill' is not installed")

from kron_kernels.cli import main
from kron_kernels.distill.data import task_from
from kron_kernels.distill.similarity import evaluate_similarity
from tests.distill.distill_runs import save_bert, sentences

TASK = task_from("custom", {"text_pair": "text_pair"}, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "validation.tsv"
    texts = [text for text, _ in sentences(24)]
    rows = [f"{texts[i]}\t{texts[i + 12]}\t{(i * 7) % 12}" for i in range(12)]
    path.write_text("text\ttext_pair\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path.parent


@torch.no_grad()
def test_score_is_the_correlation_of_cosines(folder: Path, data: Path) -> None:
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = [line.split("\t") for line in (data / "validation.tsv").read_text().splitlines()[1:]]
    vector = {
        text: model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        for line in lines
        for text in line[:2]
    }
    cosines = [float(torch.cosine_similarity(vector[left], vector[right], dim=0)) for left, right, _ in lines]
    wanted = 100 * float(torch.corrcoef(torch.tensor([cosines, [float(line[2]) for line in lines]]))[0, 1])
    result = evaluate_similarity(folder, TASK, data)
    assert result.metrics["pearson"] == pytest.approx(wanted, abs=1e-2)
    assert (result.main, result.examples) == ("spearman", 12)
    again = evaluate_similarity(model, TASK, data, tokenizer=tokenizer, batch_size=5)
    assert again.metrics == pytest.approx(result.metrics, abs=1e-3)


def test_command(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "custom", "--text-pair", "text_pair", "--regression", "--data", str(data), "--json"]
    assert main(["evaluate", str(folder), "--similarity", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["score"] == pytest.approx(evaluate_similarity(folder, TASK, data).score)


def test_bad_input(folder: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="task: expected a regression on pairs of texts for similarities, got mrpc"):
        evaluate_similarity(folder, "mrpc", data)
    with pytest.raises(ValueError, match="max_length: expected 1 to the model's 32 positions, got 64"):
        evaluate_similarity(folder, TASK, data, max_length=64)
    with pytest.raises(OSError, match=r"model: .* cannot be loaded"):
        evaluate_similarity(data, TASK, data)
