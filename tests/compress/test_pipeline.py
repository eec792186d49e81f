"""From a checkpoint to a compressed one: what is saved, by which start, and what the report says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kron_kernels.compress import compress, plan_size, read_lines, tokenize
from kron_kernels.compress.target import REPORT_NAME
from kron_kernels.compress.text import token_counts
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import KronConfig, preset
from kron_kernels.models import KronBertForMaskedLM, KronBertForSequenceClassification, KronBertModel
from tests.compress.tiny_bert import SENTENCES, save_bert


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


@pytest.mark.parametrize(("weight_dtype", "least"), [("int8", 0.999), ("int4", 0.97)])
def test_terms_and_integers(bert: Path, tmp_path: Path, weight_dtype: str, least: float) -> None:
    config = dataclasses.replace(preset("K8"), weight_dtype=weight_dtype)
    report = compress(bert, tmp_path / "out", config, terms=2)
    assert f"{weight_dtype} factors: " in str(report)
    for layer in report.conversion.layers:
        assert layer.structure.startswith("2 of ") == (layer.role != "embedding")
    assert report.quantization is not None
    assert least < report.quantization.agreement < 1
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


def test_a_planned_model_loads_and_its_plan_can_be_edited(bert: Path, text: Path, tmp_path: Path) -> None:
    report = compress(bert, tmp_path / "planned", size="1.5x", calibrate_text=text)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "planned")
    dense_params = report.conversion.params_before
    assert dense_params / 1.6 < report.conversion.params_after <= dense_params / 1.5
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report.conversion.params_after
    assert report.warm_start == "data-aware"
    assert report.planned is not None
    assert f"planned: similarities of sentences correlate {report.planned['correlation']:.2f}" in str(report)
    plan = plan_size(bert, text, size="1.5x")
    assert (plan.params, plan.config) == (report.conversion.params_after, report.conversion.config)
    content = json.loads(plan.config.to_json())
    content["rules"]["attention"] = {"rank": 3}
    edited = compress(bert, tmp_path / "edited", KronConfig.from_dict(content), calibrate_text=text, warm_start="plain")
    layers = {layer.structure for layer in edited.conversion.layers if layer.role == "attention"}
    assert layers == {"rank 3"}


@pytest.mark.parametrize(
    ("dense", "kind"),
    [
        (transformers.BertForMaskedLM, KronBertForMaskedLM),
        (transformers.BertForSequenceClassification, KronBertForSequenceClassification),
    ],
    ids=lambda each: each.__name__,
)
def test_models_with_a_head_are_planned(dense: type, kind: type, text: Path, tmp_path: Path) -> None:
    save_bert(tmp_path / "dense", dense)
    compress(tmp_path / "dense", tmp_path / "out", size="1.5x", calibrate_text=text)
    loaded = kind.from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert loaded(input_ids=torch.tensor([[2, 5, 6, 3]])).logits.isfinite().all()


def test_positions_and_an_unused_pooler_go(bert: Path, text: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(bert, encoder)
    (encoder / "1_Pooling").mkdir()
    (encoder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    pooling = encoder / "1_Pooling" / "config.json"
    for mean, length in ((True, 9), (False, 100)):
        pooling.write_text(json.dumps({"pooling_mode_mean_tokens": mean}))
        out = tmp_path / f"out-{length}"
        report = compress(encoder, out, "K8", calibrate_text=text, warm_start="data-aware", max_length=length)
        model = transformers.AutoModel.from_pretrained(out)
        assert (model.pooler is None) == mean
        assert len(model.embeddings.position_embeddings.weight) == min(length, 24)
        # The dense model of the report is the one on disk.
        assert report.conversion.params_before == sum(
            parameter.numel() for parameter in transformers.AutoModel.from_pretrained(bert).parameters()
        )
        tokens = transformers.AutoTokenizer.from_pretrained(out)(" ".join(["the"] * 30), truncation=True)["input_ids"]
        assert len(tokens) == min(length, 32)
        limit = json.loads((out / "sentence_bert_config.json").read_text())
        assert limit == {"max_seq_length": min(length, 20), "do_lower_case": False}
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        compress(bert, tmp_path / "none", "K8", max_length=0)


def test_tokens_are_counted_and_repeated_lines_calibrate_once(bert: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    counts = token_counts(tokenizer, ["the cat the", "a cat"], 19)
    assert counts.tolist() == [0, 0, 2, 2, 0, 2, 1, 2, *[0] * 11]
    again = tmp_path / "again.txt"
    again.write_text("\n\n".join([text.read_text()] * 3))
    reports = [
        compress(bert, tmp_path / str(index), "K8", calibrate_text=path, warm_start="data-aware")
        for index, path in enumerate((text, again))
    ]
    assert reports[0].calibration_lines == reports[1].calibration_lines == len(SENTENCES)
    assert reports[0].calibration_tokens == reports[1].calibration_tokens
    with pytest.raises(ValueError, match="config: expected one of config, size and keep, got 2 of them"):
        compress(bert, tmp_path / "none", "K8", size="2x")
    for options in ({"size": "2x"}, {"keep": 0.5}):
        with pytest.raises(ValueError, match="expected text to plan on"):
            compress(bert, tmp_path / "none", **options)  # type: ignore[arg-type]
