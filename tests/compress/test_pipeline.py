"""From a checkpoint to a compressed one: what is saved, by which start, and what the report says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kron_kernels.compress import compress, read_lines, tokenize
from kron_kernels.compress.target import REPORT_NAME
from kron_kernels.convert.agreement import hidden_agreement
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import preset
from kron_kernels.models import KronBertForSequenceClassification, KronBertModel
from tests.compress.tiny_bert import SENTENCES, save_bert


def test_saved_model_is_the_kronified_one(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    report = compress(bert, out, "k8")
    loaded = transformers.AutoModel.from_pretrained(out).eval()
    dense = transformers.BertModel.from_pretrained(bert).eval()
    wanted = transformers.BertModel.from_pretrained(bert).eval()
    conversion = kronify_(wanted, preset("K8"))
    assert isinstance(loaded, KronBertModel)
    assert report.conversion.params_after == conversion.params_after < conversion.params_before
    ids = torch.randint(5, 19, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).last_hidden_state, wanted(ids).last_hidden_state)
    saved = json.loads((out / REPORT_NAME).read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["conversion"]["config"]["name"] == "K8"
    assert saved["linear_flops_after"] < saved["linear_flops_before"]
    generator = torch.Generator().manual_seed(0)
    random = [{"input_ids": torch.randint(19, (8, 24), generator=generator)}]
    assert report.agreement == pytest.approx(hidden_agreement(dense, loaded, random, centred=True), abs=1e-5)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, bert)]
    assert tokenizers[0]("the cat")["input_ids"] == tokenizers[1]("the cat")["input_ids"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_heads_are_kept(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "classifier", transformers.BertForSequenceClassification)
    compress(source, tmp_path / "out", "K8")
    dense = transformers.BertForSequenceClassification.from_pretrained(source)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, KronBertForSequenceClassification)
    torch.testing.assert_close(loaded.classifier.weight, dense.classifier.weight)


def test_starts_by_name(bert: Path, text: Path, tmp_path: Path) -> None:
    tables = {}
    for method in ("plain", "data-aware", "blockwise"):
        report = compress(bert, tmp_path / method, "K8", calibrate_text=text, warm_start=method, warm_start_steps=3)
        assert report.warm_start == method
        assert (report.blocks is None) == (method != "blockwise")
        weighted = [layer.weighted_error for layer in report.conversion.layers if layer.role != "embedding"]
        assert all(error is None for error in weighted) == (method == "plain")
        # Each sentence is five words between [CLS] and [SEP].
        assert report.calibration_tokens == (0 if method == "plain" else 7 * len(SENTENCES))
        tables[method] = transformers.AutoModel.from_pretrained(tmp_path / method).encoder.layer[0].output.dense.a
    assert not torch.equal(tables["plain"], tables["data-aware"])
    assert not torch.equal(tables["blockwise"], tables["data-aware"])
    assert compress(bert, tmp_path / "textless", "K8").warm_start == "plain"


def test_terms_and_int8(bert: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(preset("K8"), weight_dtype="int8")
    report = compress(bert, tmp_path / "out", config, terms=2)
    assert {layer.terms for layer in report.conversion.layers if layer.role != "embedding"} == {2}
    assert {layer.terms for layer in report.conversion.layers if layer.role == "embedding"} == {1}
    assert report.quantization is not None
    assert 0.999 < report.quantization.agreement < 1
    assert report.quantization.bytes_after < report.quantization.bytes_before
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.encoder.layer[0].output.dense.b_int8.dtype is torch.int8


def test_printed_report_ends_in_the_next_step(bert: Path, text: Path, tmp_path: Path) -> None:
    report = compress(bert, tmp_path / "out", "K8", calibrate_text=text, warm_start_steps=3)
    lines = str(report).splitlines()
    roles = [line.split()[:2] for line in lines[1:5]]
    assert roles == [["embedding", "1"], ["attention", "8"], ["ffn_in", "2"], ["ffn_out", "2"]]
    assert lines[-1] == report.verdict
    for agreement, found, todo in (
        (0.99, "close to the dense model", "kron-kernels evaluate on your task"),
        (0.95, "usable after some training", "kron-kernels distill"),
        (0.5, "not usable yet", "kron-kernels distill"),
    ):
        verdict = dataclasses.replace(report, agreement=agreement).verdict
        assert verdict == f"agreement with the dense model {agreement:.2f}: {found}; next: {todo}"
    textless = dataclasses.replace(report, agreement=0.5, calibration_lines=0).verdict
    assert textless.endswith(" on random token ids: not usable yet; next: --calibrate TEXT, then kron-kernels distill")


# Dies in the fit, with half of the files written, and while the old folder is removed.
KILLED = """
import os, sys
from kron_kernels import compress
from kron_kernels.compress import pipeline, files
die = lambda *_, **__: os.kill(os.getpid(), 9)
moment = sys.argv[1]
if moment == "copy":
    pipeline.copy_companions = die
if moment == "remove":
    move = files._move
    files._move = lambda *names: die(move(*names))
compress.compress(sys.argv[2], sys.argv[3], "K21", overwrite=True, progress=die if moment == "fit" else None)
"""


@pytest.mark.slow
def test_a_killed_compress_leaves_a_whole_model(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(bert, out, "K8")
    for moment, name in (("fit", "K8"), ("copy", "K8"), ("remove", "K21")):
        run = subprocess.run([sys.executable, "-c", KILLED, moment, str(bert), str(out)], check=False)
        assert run.returncode == -9
        assert json.loads((out / REPORT_NAME).read_text())["conversion"]["config"]["name"] == name
        transformers.AutoModel.from_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(out)
    compress(bert, out, "K8", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_text_is_read_by_lines_and_batched_by_length(bert: Path, text: Path, tmp_path: Path) -> None:
    assert read_lines(text, 3) == SENTENCES[:3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    sentences = ["the cat", *["the small red cat sees a big blue dog"] * 40, "a dog"]
    batches = tokenize(tokenizer, sentences, max_length=8)
    assert [batch["input_ids"].shape[0] for batch in batches] == [32, 10]
    assert all(batch["input_ids"].shape[1] <= 8 for batch in batches)
    assert int(batches[0]["attention_mask"].sum()) == 2 * 4 + 30 * 8
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, most, message in (
        ("blank", 1, "expected text, a sentence a line"),
        ("latin", 1, "expected UTF-8"),
        ("blank", 0, "calibrate_lines: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_lines(tmp_path / name, most)
