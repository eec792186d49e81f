"""The compress pipeline and its command, on a tiny random BERT with a tokenizer of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kron_kernels.cli import main
from kron_kernels.compress import compress, pipeline, read_lines, tokenize
from kron_kernels.compress.pipeline import REPORT_NAME
from kron_kernels.convert.agreement import output_errors
from kron_kernels.convert.calibrate import calibrate as moments_of
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.presets import preset
from kron_kernels.models import KronBertForSequenceClassification, KronBertModel
from kron_kernels.nn import KronLinear

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "and", "or", "small", "big", "red", "blue"]
SENTENCES = [f"the {left} {verb} a {right}" for left in WORDS[2:5] for verb in WORDS[5:8] for right in WORDS[2:5]]
Capture = pytest.CaptureFixture[str]


def save_bert(folder: Path, architecture: type[Any] = transformers.BertModel) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    architecture(transformers.BertConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("dense") / "bert")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    return path


def test_saved_model_is_the_kronified_one(bert: Path, tmp_path: Path) -> None:
    report = compress(bert, tmp_path / "out", "K8")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    wanted = transformers.BertModel.from_pretrained(bert).eval()
    conversion = kronify_(wanted, preset("K8"))
    assert isinstance(loaded, KronBertModel)
    assert report.conversion.params_after == conversion.params_after < conversion.params_before
    ids = torch.randint(5, 19, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).last_hidden_state, wanted(ids).last_hidden_state)


def test_tokenizer_and_report_are_saved_and_nothing_is_left_behind(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    report = compress(bert, out, "K21")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    dense = transformers.AutoTokenizer.from_pretrained(bert)
    assert tokenizer("the cat")["input_ids"] == dense("the cat")["input_ids"]
    saved = json.loads((out / REPORT_NAME).read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["conversion"]["config"]["name"] == "K21"
    assert saved["linear_flops_after"] < saved["linear_flops_before"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == (out / REPORT_NAME).parent.parent.stat().st_mode & 0o777
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (out / REPORT_NAME).stat().st_mode & 0o777


def test_heads_are_kept(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "classifier", transformers.BertForSequenceClassification)
    compress(source, tmp_path / "out", "K8")
    dense = transformers.BertForSequenceClassification.from_pretrained(source)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, KronBertForSequenceClassification)
    torch.testing.assert_close(loaded.classifier.weight, dense.classifier.weight)


def test_calibration_lowers_the_output_error(bert: Path, text: Path, tmp_path: Path) -> None:
    plain = compress(bert, tmp_path / "plain", "K8")
    aware = compress(bert, tmp_path / "aware", "K8", calibrate_text=text, calibrate_lines=20, warm_start="data-aware")
    assert (plain.calibration_lines, aware.calibration_lines) == (0, 20)
    # Each sentence is five words between [CLS] and [SEP].
    assert aware.calibration_tokens == 20 * 7
    dense = transformers.BertModel.from_pretrained(bert).eval()
    held_out = tokenize(transformers.AutoTokenizer.from_pretrained(bert), SENTENCES[20:])
    moments = moments_of(dense, held_out)
    errors = {
        name: output_errors(dense, transformers.AutoModel.from_pretrained(tmp_path / name), moments)
        for name in ("plain", "aware")
    }
    assert len(errors["aware"]) == 2 * 6
    assert sum(errors["aware"].values()) < 0.5 * sum(errors["plain"].values())


def test_output_errors_are_those_of_the_layers_outputs(bert: Path) -> None:
    dense = transformers.BertModel.from_pretrained(bert).eval()
    model = transformers.BertModel.from_pretrained(bert).eval()
    kronify_(model, "K8")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, KronLinear):
                module.bias += 0.01
    inputs: dict[str, torch.Tensor] = {}
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    batch = {"input_ids": torch.randint(5, 19, (4, 9))}
    errors = output_errors(dense, model, moments_of(dense, [batch]))
    for name, error in errors.items():
        linear = dense.get_submodule(name)
        with torch.no_grad():
            difference = linear(inputs[name]) - model.get_submodule(name)(inputs[name])
            wanted = float(difference.norm() / (linear(inputs[name]) - linear.bias).norm())
        assert error == pytest.approx(wanted, rel=1e-4)


def test_terms_add_up_in_linear_layers_only(bert: Path, tmp_path: Path) -> None:
    report = compress(bert, tmp_path / "out", "K8", terms=2)
    assert {layer.terms for layer in report.conversion.layers if layer.role != "embedding"} == {2}
    assert {layer.terms for layer in report.conversion.layers if layer.role == "embedding"} == {1}


def test_existing_folder_is_refused_unless_told(bert: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert main(["compress", str(bert), str(out), "--preset", "K8"]) == 2
    assert (
        capsys.readouterr().err
        == f"kron-kernels compress: error: out: {out} exists; remove it, or ask to overwrite it\n"
    )
    assert (out / "precious").exists()
    assert main(["compress", str(bert), str(out), "--preset", "K8", "--force"]) == 0
    assert not (out / "precious").exists()
    assert (out / REPORT_NAME).exists()


def test_overwriting_the_model_itself_is_refused(bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "zoo" / "bert"
    shutil.copytree(bert, copy)
    for out in (copy, copy.parent):
        with pytest.raises(ValueError, match=r"out: .* holds the model itself"):
            compress(copy, out, "K8", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="expected a folder to overwrite, got the file"):
        compress(copy, tmp_path / "file", "K8", overwrite=True)


def test_a_failed_save_keeps_the_old_folder(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    compress(bert, out, "K8")
    before = (out / REPORT_NAME).read_bytes()

    def disk_full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pipeline, "copy_companions", disk_full)
    with pytest.raises(OSError, match="no space left"):
        compress(bert, out, "K21", overwrite=True)
    assert (out / REPORT_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_command_prints_a_table_and_progress(bert: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["compress", str(bert), str(tmp_path / "out"), "--preset", "K8", "--calibrate", str(text)]
    assert main([*arguments, "--warm-start-steps", "4"]) == 0
    captured = capsys.readouterr()
    assert "encoder.layer.0.attention.self.query" in captured.out
    assert "output error" in captured.out
    assert f"data-aware fit on {len(SENTENCES)} lines, {len(SENTENCES) * 7} tokens" in captured.out
    assert "[13/13] " in captured.err
    assert "block-wise training, 4 steps each" in captured.out
    assert "[12/12] warm start: encoder.layer.1" in captured.err
    saved = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert saved["warm_start"] == "blockwise"
    blocks = saved["blocks"]["blocks"]
    assert [block["name"] for block in blocks] == ["embeddings", "encoder.layer.0", "encoder.layer.1"]
    assert blocks[-1]["error_after"] < blocks[-1]["error_before"]


def test_warm_start_by_name(bert: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    tables = {}
    for method in ("plain", "data-aware", "blockwise"):
        report = compress(bert, tmp_path / method, "K8", calibrate_text=text, warm_start=method, warm_start_steps=3)
        assert report.warm_start == method
        assert (report.blocks is None) == (method != "blockwise")
        weighted = [layer.weighted_error for layer in report.conversion.layers if layer.role != "embedding"]
        assert all(error is None for error in weighted) == (method == "plain")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / method)
        tables[method] = loaded.encoder.layer[0].output.dense.a
    assert not torch.equal(tables["plain"], tables["data-aware"])
    assert not torch.equal(tables["blockwise"], tables["data-aware"])
    assert compress(bert, tmp_path / "textless", "K8").warm_start == "plain"
    textless = [str(bert), str(tmp_path / "no"), "--preset", "K8", "--warm-start"]
    assert "warm_start: expected text to calibrate on for 'blockwise', got none" in run_error(
        [*textless, "blockwise"], capsys
    )
    assert "warm_start: expected one of plain, data-aware, blockwise, got 'best'" in run_error(
        [*textless, "best"], capsys
    )
    bad = [*textless, "blockwise", "--calibrate", str(text), "--warm-start-steps", "-1"]
    assert "steps: expected an int of at least 0, got -1" in run_error(bad, capsys)
    assert not (tmp_path / "no").exists()


def test_command_takes_a_config_and_prints_json(bert: Path, tmp_path: Path, capsys: Capture) -> None:
    config = preset("K8")
    (tmp_path / "config.json").write_text(config.to_json())
    arguments = ["compress", str(bert), str(tmp_path / "out"), "--config", str(tmp_path / "config.json"), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "KronBertModel"
    assert report["conversion"]["compression"] > 1


def run_error(arguments: list[str], capsys: Capture) -> str:
    assert main(["compress", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("kron-kernels compress: error: ")
    return last


def test_bad_input_is_one_clear_line(bert: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "out")
    assert "preset: expected one of" in run_error([str(bert), out, "--preset", "K9"], capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "model: expected a folder with config.json" in run_error([str(empty), out, "--preset", "K8"], capsys)
    (tmp_path / "blank.txt").write_text("\n \n")
    blank = ["--calibrate", str(tmp_path / "blank.txt")]
    assert "expected text, a sentence a line" in run_error([str(bert), out, "--preset", "K8", *blank], capsys)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    latin = ["--calibrate", str(tmp_path / "latin.txt")]
    assert "expected UTF-8 text" in run_error([str(bert), out, "--preset", "K8", *latin], capsys)
    absent = ["--calibrate", str(tmp_path / "absent.txt")]
    assert "absent.txt" in run_error([str(bert), out, "--preset", "K8", *absent], capsys)
    none = ["--calibrate", str(text), "--calibrate-lines", "0"]
    assert "calibrate_lines: expected at least 1, got 0" in run_error([str(bert), out, "--preset", "K8", *none], capsys)
    (tmp_path / "broken.json").write_text("{")
    assert "error" in run_error([str(bert), out, "--config", str(tmp_path / "broken.json")], capsys)
    assert "terms: expected" in run_error([str(bert), out, "--preset", "K8", "--terms", "0"], capsys)
    assert not (tmp_path / "out").exists()


def test_missing_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = run_error([str(tmp_path / "absent"), str(tmp_path / "out"), "--preset", "K8"], capsys)
    assert "neither a checkpoint folder nor to be had from the hub" in error


@pytest.mark.parametrize("damage", ["truncated", "absent", "incomplete"])
def test_damaged_checkpoint(damage: str, bert: Path, tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "bert"
    shutil.copytree(bert, source)
    weights = source / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        wanted = "damaged checkpoint"
    elif damage == "absent":
        weights.unlink()
        wanted = "model.safetensors"
    else:
        model = transformers.BertModel.from_pretrained(bert)
        state = model.state_dict()
        del state["encoder.layer.1.output.dense.weight"]
        model.save_pretrained(source, state_dict=state)
        wanted = "lacks 1 weights, among them encoder.layer.1.output.dense.weight"
    assert wanted in run_error([str(source), str(tmp_path / "out"), "--preset", "K8"], capsys)


def test_other_architectures_are_named(tmp_path: Path, capsys: Capture) -> None:
    config = transformers.RobertaConfig(vocab_size=20, **SIZES)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    error = run_error([str(tmp_path / "roberta"), str(tmp_path / "out"), "--preset", "K8"], capsys)
    assert "expected a BERT checkpoint" in error
    assert "RobertaModel of type 'roberta'" in error


def test_read_lines_takes_the_first_that_are_not_blank(text: Path) -> None:
    assert read_lines(text, 3) == SENTENCES[:3]
    assert read_lines(text, 10_000) == SENTENCES


def test_tokenize_batches_like_lengths(bert: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    sentences = ["the cat", *["the small red cat sees a big blue dog"] * 40, "a dog"]
    batches = tokenize(tokenizer, sentences, max_length=8)
    assert [batch["input_ids"].shape[0] for batch in batches] == [32, 10]
    assert all(batch["input_ids"].shape[1] <= 8 for batch in batches)
    assert int(batches[0]["attention_mask"].sum()) == 2 * 4 + 30 * 8


@pytest.mark.parametrize("calibrate", [False, True])
def test_int8_factors(calibrate: bool, bert: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    arguments = ["compress", str(bert), str(out), "--preset", "K8", "--weight-dtype", "int8", "--warm-start-steps", "2"]
    assert main([*arguments, *(["--calibrate", str(text)] if calibrate else [])]) == 0
    printed = capsys.readouterr().out
    assert "int8 factors: " in printed
    assert printed.rstrip().endswith("on the text" if calibrate else "on random token ids")
    saved = json.loads((out / REPORT_NAME).read_text())
    assert saved["conversion"]["config"]["weight_dtype"] == "int8"
    assert saved["quantization"]["bytes_after"] < saved["quantization"]["bytes_before"]
    assert 0.999 < saved["quantization"]["agreement"] < 1
    loaded = transformers.AutoModel.from_pretrained(out)
    assert loaded.encoder.layer[0].output.dense.b_int8.dtype is torch.int8
    compress(bert, tmp_path / "plain", "K8", calibrate_text=text if calibrate else None, warm_start_steps=2)
    assert (out / "model.safetensors").stat().st_size < (tmp_path / "plain" / "model.safetensors").stat().st_size


def test_int8_by_a_config_and_another_weight_dtype(bert: Path, tmp_path: Path, capsys: Capture) -> None:
    config = dataclasses.replace(preset("K8"), weight_dtype="int8")
    assert compress(bert, tmp_path / "out", config).quantization is not None
    bad = ["--preset", "K8", "--weight-dtype", "int4"]
    assert "weight_dtype: expected None or 'int8', got 'int4'" in run_error(
        [str(bert), str(tmp_path / "no"), *bad], capsys
    )
