"""ONNX packages: their structure, their outputs in onnxruntime, and files that are not loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kron_kernels.runtime import ExportReport, export_model, load_package
from tests.models.bert_cases import LOW_RANK
from tests.runtime.folders import KRON, SIZES, assert_same, batch, eager, save_dense, save_kron

for name in ("onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason="the extra 'serving' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'serving' is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model", "KronBertForMaskedLM")


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[Path, ExportReport]:
    out = folder.parent / "model.onnx"
    return out, export_model(folder, out)


@pytest.mark.slow
def test_any_batch_and_sequence(folder: Path, exported: tuple[Path, ExportReport]) -> None:
    package = load_package(exported[0])
    for inputs in (batch(1, 1), batch(1, 20), {name: value[1:, 3:] for name, value in batch(4, 12).items()}):
        assert_same(package(**inputs), eager(folder, inputs, "KronBertForMaskedLM"), inputs["attention_mask"])


@pytest.mark.slow
def test_low_rank_layers_bands_and_their_decoder(tmp_path: Path) -> None:
    save_kron(tmp_path / "model", "KronBertForMaskedLM", LOW_RANK)
    export_model(tmp_path / "model", tmp_path / "model.onnx")
    inputs = batch(3, 9)
    wanted = eager(tmp_path / "model", inputs, "KronBertForMaskedLM")
    assert_same(load_package(tmp_path / "model.onnx")(**inputs), wanted, inputs["attention_mask"])
    shapes = [list(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    largest = max(shapes, key=lambda shape: torch.Size(shape).numel())
    assert sorted(largest) == [20, 192]  # a factor, not the table of 50x48


@pytest.mark.slow
def test_no_weight_is_built(exported: tuple[Path, ExportReport]) -> None:
    graph = onnx.load(exported[0]).graph
    terms = SIZES["num_hidden_layers"] * (4 * KRON.rules["attention"].terms + 2) + 1  # the decoder is the last
    # Two of attention itself in each layer, one of the dense layer before the decoder.
    assert exported[1].nodes["MatMul"] == 2 * terms + 2 * SIZES["num_hidden_layers"] + 1
    large = [list(tensor.dims) for tensor in graph.initializer if torch.Size(tensor.dims).numel() >= 48 * 48]
    assert large == [[48, 48]]  # that dense layer's own


@pytest.mark.slow
def test_documented_code_runs_a_dense_model_without_torch(tmp_path: Path) -> None:
    assert export_model(save_dense(tmp_path / "model"), tmp_path / "small.onnx").architecture == "BertModel"
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = text.split("## By onnxruntime alone\n")[1].split("```python\n")[1].split("```")[0]
    code += "import sys\nassert 'torch' not in sys.modules\nprint(hidden.tolist())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    wanted = eager(tmp_path / "model", inputs, "BertModel")["last_hidden_state"]
    assert_same({"hidden": torch.tensor(json.loads(done.stdout))}, {"hidden": wanted}, ids != 0)


@pytest.mark.slow
def test_damage_and_other_files_are_errors(exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    whole, path = exported[0].read_bytes(), tmp_path / "bad.onnx"
    for content in (b"", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"bad.onnx: damaged (or truncated )?package: "):
            load_package(path)
    for place in (len(whole) // 3, whole.index(b"kron_kernels_sha256") + 21):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(OSError, match=r"bad.onnx: damaged package: expected the sha256"):
            load_package(path)
    model = onnx.load(exported[0])
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(OSError, match="expected a package made by kron-kernels export"):
        load_package(path)


@pytest.mark.slow
def test_a_missing_package_names_the_extra(exported, folder: Path, tmp_path: Path, monkeypatch) -> None:
    for module, run in (
        ("onnxruntime", lambda: load_package(exported[0])),
        ("onnx", lambda: export_model(folder, tmp_path / "out.onnx")),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RuntimeError, match=rf"needs {module}: pip install 'kron_kernels\[serving\]'"):
            run()
    assert not list(tmp_path.iterdir())
