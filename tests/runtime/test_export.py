"""Export to torch.export packages: every head, any shape, what is checked and what is an error."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kron_kernels.convert.presets import KronConfig
from kron_kernels.runtime import export, export_model, load_package
from kron_kernels.runtime.program import export_program
from tests.models.bert_cases import LOW_RANK
from tests.runtime.folders import KRON, assert_same, batch, eager, save_dense, save_kron


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kron"),
    [
        ("KronBertForMaskedLM", KRON),
        ("KronBertForMaskedLM", replace(LOW_RANK, weight_dtype="int4")),
        ("KronBertForQuestionAnswering", KRON),
    ],
    ids=["mlm", "mlm-low-rank-int4", "qa"],
)
def test_heads(kind: str, kron: KronConfig, tmp_path: Path) -> None:
    save_kron(tmp_path / "model", kind, kron)
    report = export_model(tmp_path / "model", tmp_path / "deep" / "model.pt2")
    package = load_package(tmp_path / "deep" / "model.pt2")
    assert package.info.architecture == report.architecture == kind
    assert package.info.outputs == report.outputs == tuple(eager(tmp_path / "model", batch(1, 2), kind))
    inputs = batch(3, 9)
    assert_same(package(**inputs), eager(tmp_path / "model", inputs, kind), inputs["attention_mask"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt2"]


@pytest.mark.slow
def test_bf16_and_the_dense_model_beside_it(folder: Path, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    report = export_model(folder, tmp_path / "model.pt2", dtype="bf16", dense_dir=dense)
    package = load_package(tmp_path / "model.pt2")
    assert (report.tolerance, package.info.dtype) == (5e-2, "bf16")
    assert all(value.dtype is torch.bfloat16 for value in package(**batch(2, 3)).values())
    assert report.dense_bytes == (dense / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_wrong_outputs_leave_no_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_model(model: torch.nn.Module) -> torch.export.ExportedProgram:
        other = copy.deepcopy(model)
        other.model.pooler.dense.bias.data.add_(0.01)
        return export_program(other)

    monkeypatch.setattr(export, "export_program", of_another_model)
    (tmp_path / "old.pt2").write_text("mine")
    with pytest.raises(RuntimeError, match=r"not agree with eager torch: pooler_output by .*, the tolerance is 1e-04"):
        export_model(folder, tmp_path / "old.pt2", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt2"]
    assert (tmp_path / "old.pt2").read_text() == "mine"


def test_wrong_requests(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.pt2").write_text("mine")
    before = sorted(tmp_path.iterdir())
    for error, message, out, options in (
        (ValueError, r"out: expected a name ending in .pt2 or .onnx, got .*a.bin", "a.bin", {}),
        (ValueError, "dtype: expected one of 'fp32', 'bf16', got 'fp16'", "a.pt2", {"dtype": "fp16"}),
        (ValueError, "dtype: expected 'fp32' for ONNX, got 'bf16'", "a.onnx", {"dtype": "bf16"}),
        (FileExistsError, "there.pt2 exists; remove it, or ask to overwrite it", "there.pt2", {}),
        (FileNotFoundError, "dense: expected a model folder", "a.pt2", {"dense_dir": tmp_path}),
    ):
        with pytest.raises(error, match=message):
            export_model(folder, tmp_path / out, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_models(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(OSError, match="damaged checkpoint"):
        export_model(tmp_path / "model", tmp_path / "out.pt2")
    config.write_text('{"architectures": ["RobertaModel"]}')
    with pytest.raises(ValueError, match=r"expected one of BertModel, .*KronBertModel.*, got Rob"):
        export_model(tmp_path / "model", tmp_path / "out.pt2")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"model: expected a model folder, with config.json, got"):
        export_model(tmp_path / "model", tmp_path / "out.pt2")
