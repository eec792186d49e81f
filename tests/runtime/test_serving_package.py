"""Packages that torch.export saved: what goes in and out, what is refused; nothing here is compiled."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kron_kernels import backends
from kron_kernels.runtime import Package, PackageInfo, export_model, load_package
from kron_kernels.runtime.program import load_model
from tests.runtime.serving_models import SIZES, assert_same, batch, eager, save_dense, save_kron

KINDS = {
    "KronBertModel": ("last_hidden_state", "pooler_output"),
    "KronBertForMaskedLM": ("logits",),
    "KronBertForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "KronBertForSequenceClassification": ("logits",),
    "KronBertForQuestionAnswering": ("start_logits", "end_logits"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    out = folder.parent / "model.pt2"
    export_model(folder, out, "export")
    return out


@pytest.fixture(scope="module")
def package(exported: Path) -> Package:
    return load_package(exported)


@pytest.mark.parametrize("kind", KINDS)
def test_every_head(kind: str, tmp_path: Path) -> None:
    save_kron(tmp_path / "model", kind)
    report = export_model(tmp_path / "model", tmp_path / "deep" / "model.pt2", "export")
    package = load_package(tmp_path / "deep" / "model.pt2")
    assert package.info.architecture == report.architecture == kind
    assert package.info.outputs == report.outputs == KINDS[kind]
    assert set(report.nodes) <= {name for name in dir(torch.ops.kron_kernels) if name.startswith("kron_")}
    assert sum(report.nodes.values()) > 0
    inputs = batch(3, 9)
    assert_same(package(**inputs), eager(tmp_path / "model", inputs, kind), inputs["attention_mask"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (2, 1), (5, 9)])
def test_any_batch_and_sequence(shape: tuple[int, int], folder: Path, package: Package) -> None:
    inputs = batch(*shape)
    assert_same(package(**inputs), eager(folder, inputs), inputs["attention_mask"])


def test_inputs_have_defaults(folder: Path, package: Package) -> None:
    ids = batch(2, 6)["input_ids"]
    assert_same(package(input_ids=ids), eager(folder, {"input_ids": ids}), torch.ones_like(ids))


def test_ops_stay_in_the_graph_whatever_computes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_DEFAULT", "reference")
    monkeypatch.setattr(backends, "CPU_BY_DEFAULT", False)
    assert export_model(folder, tmp_path / "model.pt2", "export").nodes
    assert backends.resolve(None, "cpu") == "reference"


def test_bf16_and_the_dense_model_beside_it(folder: Path, tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    report = export_model(folder, tmp_path / "model.pt2", "export", dtype="bf16", dense_dir=dense)
    package = load_package(tmp_path / "model.pt2")
    assert (report.tolerance, package.info.dtype) == (5e-2, "bf16")
    assert all(value.dtype is torch.bfloat16 for value in package(**batch(2, 3)).values())
    assert report.dense_bytes == (dense / "model.safetensors").stat().st_size
    assert report.model_bytes == (folder / "model.safetensors").stat().st_size
    assert report.package_bytes == (tmp_path / "model.pt2").stat().st_size
    dense_report = export_model(dense, tmp_path / "dense.pt2", "export")
    assert (dense_report.architecture, dense_report.nodes, dense_report.dense_bytes) == ("BertModel", {}, None)


def test_an_encoder_without_pooler(tmp_path: Path) -> None:
    save_kron(tmp_path / "model", add_pooling_layer=False)
    assert load_model(tmp_path / "model", torch.float32).pooler is None
    assert export_model(tmp_path / "model", tmp_path / "model.pt2", "export").outputs == ("last_hidden_state",)


def test_no_path_of_this_machine_in_a_package(exported: Path) -> None:
    assert str(Path(backends.__file__).parent).encode() not in exported.read_bytes()


def test_wrong_inputs(package: Package) -> None:
    good = batch(2, 4)
    with pytest.raises(ValueError, match=r"inputs: expected input_ids and, .* got attention_mask"):
        package(attention_mask=good["attention_mask"])
    with pytest.raises(ValueError, match="got input_ids, labels"):
        package(input_ids=good["input_ids"], labels=good["input_ids"])
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape of input_ids, \(2, 4\), got \(2, 3\)"):
        package(input_ids=good["input_ids"], attention_mask=good["attention_mask"][:, :3])
    with pytest.raises(
        TypeError, match=r"input_ids: expected a tensor of torch.int64 on the cpu, got torch.int32 on cpu"
    ):
        package(input_ids=good["input_ids"].int())
    with pytest.raises(TypeError, match=r"input_ids: .* got list"):
        package(attention_mask=good["attention_mask"], input_ids=[[1, 2]])
    for shape in ((0, 4), (2, 0), (2, 21), (4,)):
        expected = r"with at least one row and 1 to 20 columns, got " + re.escape(str(shape))
        with pytest.raises(ValueError, match=expected):
            package(input_ids=torch.ones(shape, dtype=torch.int64))
    for name, size in (("input_ids", SIZES["vocab_size"]), ("token_type_ids", 2)):
        for wrong in (-1, size):
            inputs = batch(2, 4)
            inputs[name][1, 2] = wrong
            with pytest.raises(IndexError, match=f"{name}: expected ids from 0 to {size - 1}, got {wrong}"):
                package(**inputs)


def copied(source: Path, target: Path, change: Callable[[dict], None] | None, without: str = " ") -> Path:
    """The archive with its information changed, or left out; and without the files named so."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            if without in entry.filename:
                continue
            content = old.read(entry)
            if entry.filename.endswith("extra/kron_kernels.json"):
                if change is None:
                    continue
                info = json.loads(content)
                change(info)
                content = json.dumps(info).encode()
            new.writestr(entry, content)
    return target


def test_damage_is_an_oserror_of_one_line(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    for name, content in {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "end": whole[:-1],
        "bit": bytes(middle),
        "other": b"no archive at all",
    }.items():
        path = tmp_path / f"{name}.pt2"
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"{name}.pt2: damaged or truncated package: ") as error:
            load_package(path)
        assert "\n" not in str(error.value)


def test_other_archives_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="expected a package made by kron-kernels export"):
        load_package(copied(exported, tmp_path / "foreign.pt2", None))
    for change, message in (
        (lambda info: info.update(version=2), "expected package information of version 1"),
        (lambda info: info.pop("outputs"), "package information: 'outputs'"),
        (lambda info: info.update(more=1), "package information: .*'more'"),
        (lambda info: info.update(format="onnx"), "expected the format aoti or export, got 'onnx'"),
    ):
        with pytest.raises(OSError, match=message):
            load_package(copied(exported, tmp_path / "changed.pt2", change))
    with pytest.raises(
        OSError, match=f"torch {re.escape(torch.__version__)} cannot load this package, made by torch 2.1"
    ):
        load_package(copied(exported, tmp_path / "less.pt2", lambda info: info.update(torch="2.1"), without="models/"))


def test_no_file_and_no_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"package: expected a file or a model folder, got .*absent.pt2"):
        load_package(tmp_path / "absent.pt2")
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match=r"package: expected a file ending in .pt2 or .onnx, got .*model.bin"):
        load_package(tmp_path / "model.bin")


def test_information_survives_json(package: Package) -> None:
    assert PackageInfo.from_json(package.info.to_json()) == package.info
    assert dataclasses.asdict(package.info)["max_sequence"] == 20


def test_wrong_requests(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.pt2").write_text("mine")
    (tmp_path / "folder.pt2").mkdir()
    before = sorted(tmp_path.iterdir())
    for error, message, arguments, options in (
        (ValueError, "format: expected one of 'aoti', 'export', 'onnx', got 'tflite'", ("a.pt2", "tflite"), {}),
        (ValueError, "dtype: expected one of 'fp32', 'bf16', got 'fp16'", ("a.pt2", "export"), {"dtype": "fp16"}),
        (ValueError, "dtype: expected 'fp32' for the format onnx", ("a.onnx", "onnx"), {"dtype": "bf16"}),
        (ValueError, "out: expected a name ending in .onnx for the format onnx", ("a.pt2", "onnx"), {}),
        (FileExistsError, "there.pt2 exists; remove it, or ask to overwrite it", ("there.pt2", "export"), {}),
        (FileExistsError, "expected a file, got the folder", ("folder.pt2", "export"), {"overwrite": True}),
        (FileNotFoundError, "dense: expected a model folder", ("a.pt2", "export"), {"dense_dir": tmp_path}),
    ):
        with pytest.raises(error, match=message):
            export_model(folder, tmp_path / arguments[0], arguments[1], **options)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.pt2").read_text() == "mine"


def test_wrong_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model: expected a model folder, with config.json and weights, got"):
        export_model(tmp_path / "absent", tmp_path / "out.pt2", "export")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(OSError, match="damaged checkpoint"):
        export_model(broken, tmp_path / "out.pt2", "export")
    (broken / "config.json").write_text('{"architectures": ["RobertaModel"], "model_type": "roberta"}')
    with pytest.raises(ValueError, match=r"model: expected one of BertModel, .*KronBertModel.*, got RobertaModel"):
        export_model(broken, tmp_path / "out.pt2", "export")
    (broken / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"model: damaged configuration .*config.json"):
        export_model(broken, tmp_path / "out.pt2", "export")
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model: expected a model folder, with config.json, got"):
        export_model(broken, tmp_path / "out.pt2", "export")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_missing_compiler_is_named(folder: Path, tmp_path: Path) -> None:
    from torch._inductor import config

    absent = config.patch({"cpp.cxx": ("absent-compiler",)})
    with absent, pytest.raises(RuntimeError, match=r"No working C\+\+ compiler found .*absent-compiler"):
        export_model(folder, tmp_path / "model.pt2", "aoti")
    assert not list(tmp_path.iterdir())
