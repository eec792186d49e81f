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
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import preset
from kron_kernels.models import KronBertModel
from tests.compress.tiny_bert import SENTENCES


def test_saved_model_is_the_kronified_one(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    report = compress(bert, out, "k8")
    loaded = transformers.AutoModel.from_pretrained(out).eval()
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
    assert f"agreement with the dense model {report.agreement:.2f} on random" in str(report).splitlines()[-1]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, bert)]
    assert tokenizers[0]("the cat")["input_ids"] == tokenizers[1]("the cat")["input_ids"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_terms_and_int8(bert: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(preset("K8"), weight_dtype="int8")
    report = compress(bert, tmp_path / "out", config, terms=2)
    for layer in report.conversion.layers:
        assert layer.structure.startswith("2 of ") == (layer.role != "embedding")
    assert report.quantization is not None
    assert 0.999 < report.quantization.agreement < 1
    assert report.quantization.bytes_after < report.quantization.bytes_before


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


def test_starts_by_name(bert: Path, text: Path, tmp_path: Path) -> None:
    tables = []
    for method in ("plain", "data-aware", "blockwise"):
        report = compress(bert, tmp_path / method, "K8", calibrate_text=text, warm_start=method, warm_start_steps=3)
        # Each sentence is five words between [CLS] and [SEP].
        assert report.calibration_tokens == (0 if method == "plain" else 7 * len(SENTENCES))
        tables.append(transformers.AutoModel.from_pretrained(tmp_path / method).encoder.layer[0].output.dense.a)
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[1], tables[2])


def test_text_is_read_by_lines_and_batched_by_length(bert: Path, text: Path, tmp_path: Path) -> None:
    assert read_lines(text, 3) == SENTENCES[:3]
    sentences = ["the cat", *["the small red cat sees a big blue dog"] * 40, "a dog"]
    batches = tokenize(transformers.AutoTokenizer.from_pretrained(bert), sentences, max_length=8)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(32, 8), (10, 8)]
    assert int(batches[0]["attention_mask"].sum()) == 2 * 4 + 30 * 8
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, message in (("blank", "expected text, a sentence a line"), ("latin", "expected UTF-8")):
        with pytest.raises(ValueError, match=message):
            read_lines(tmp_path / name, 1)
