"""Export to torch.export packages: every head, any shape, what is checked and what is an error."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from kron_kernels import backends
from kron_kernels.runtime import export, export_model, load_package
from kron_kernels.runtime.program import export_program
from tests.runtime.folders import assert_same, batch, eager, save_dense, save_kron

HEADS = {
    "KronBertForMaskedLM": ("logits",),
    "KronBertForQuestionAnswering": ("start_logits", "end_logits"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind: str, tmp_path: Path) -> None:
    save_kron(tmp_path / "model", kind)
    report = export_model(tmp_path / "model", tmp_path / "deep" / "model.pt2")
    package = load_package(tmp_path / "deep" / "model.pt2")
    assert package.info.architecture == report.architecture == kind
    assert package.info.outputs == report.outputs == HEADS[kind]
    assert set(report.nodes) <= set(dir(torch.ops.kron_kernels))
    inputs = batch(3, 9)
    assert_same(package(**inputs), eager(tmp_path / "model", inputs, kind), inputs["attention_mask"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt2"]


@pytest.mark.slow
def test_ops_stay_in_the_graph_whatever_computes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KRON_KERNELS_BACKEND", "reference")
    assert export_model(folder, tmp_path / "model.pt2").nodes["kron_ffn"] == 2


@pytest.mark.slow
def test_bf16_and_the_dense_model_beside_it(folder: Path, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    report = export_model(folder, tmp_path / "model.pt2", dtype="bf16", dense_dir=dense)
    package = load_package(tmp_path / "model.pt2")
    assert (report.tolerance, package.info.dtype) == (5e-2, "bf16")
    assert all(value.dtype is torch.bfloat16 for value in package(**batch(2, 3)).values())
    assert report.dense_bytes == (dense / "model.safetensors").stat().st_size
    assert report.model_bytes == (folder / "model.safetensors").stat().st_size
    assert report.package_bytes == (tmp_path / "model.pt2").stat().st_size


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


@pytest.mark.slow
def test_no_path_of_this_machine_in_a_package(folder: Path, tmp_path: Path) -> None:
    save_kron(tmp_path / "model", add_pooling_layer=False)
    assert export_model(tmp_path / "model", tmp_path / "model.pt2").outputs == ("last_hidden_state",)
    assert str(Path(backends.__file__).parent).encode() not in (tmp_path / "model.pt2").read_bytes()


def test_wrong_requests(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.pt2").write_text("mine")
    (tmp_path / "folder.pt2").mkdir()
    before = sorted(tmp_path.iterdir())
    for error, message, out, options in (
        (ValueError, r"out: expected a name ending in .pt2 or .onnx, got .*a.bin", "a.bin", {}),
        (ValueError, "dtype: expected one of 'fp32', 'bf16', got 'fp16'", "a.pt2", {"dtype": "fp16"}),
        (ValueError, "dtype: expected 'fp32' for ONNX, got 'bf16'", "a.onnx", {"dtype": "bf16"}),
        (FileExistsError, "there.pt2 exists; remove it, or ask to overwrite it", "there.pt2", {}),
        (FileExistsError, "expected a file, got the folder", "folder.pt2", {"overwrite": True}),
        (FileNotFoundError, "dense: expected a model folder", "a.pt2", {"dense_dir": tmp_path}),
    ):
        with pytest.raises(error, match=message):
            export_model(folder, tmp_path / out, **options)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.pt2").read_text() == "mine"


def test_wrong_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model: expected a model folder, with config.json and weights, got"):
        export_model(tmp_path / "absent", tmp_path / "out.pt2")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(OSError, match="damaged checkpoint"):
        export_model(broken, tmp_path / "out.pt2")
    for content, error, message in (
        (
            '{"architectures": ["RobertaModel"]}',
            ValueError,
            "expected one of BertModel, .*KronBertModel.*, got Rob",
        ),
        ("{", OSError, "model: damaged configuration .*config.json"),
    ):
        (broken / "config.json").write_text(content)
        with pytest.raises(error, match=message):
            export_model(broken, tmp_path / "out.pt2")
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model: expected a model folder, with config.json, got"):
        export_model(broken, tmp_path / "out.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
