"""Packages loaded and run: folders and .pt2 files, what goes in, and files that are not loaded."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kron_kernels.models import KronBertModel
from kron_kernels.runtime import Package, PackageInfo, export_model, load_package
from tests.runtime.folders import (
    SIZES,
    assert_same,
    batch,
    change_config,
    documented,
    eager,
    save_dense,
    save_kron,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    out = folder.parent / "model.pt2"
    export_model(folder, out)
    return out


@pytest.fixture(scope="module", params=["folder", pytest.param("export", marks=pytest.mark.slow)])
def package(request: pytest.FixtureRequest, folder: Path) -> Package:
    return load_package(folder if request.param == "folder" else request.getfixturevalue("exported"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (2, 1), (5, 9)])
def test_any_batch_and_sequence(shape: tuple[int, int], folder: Path, package: Package) -> None:
    inputs = batch(*shape)
    assert_same(package(**inputs), eager(folder, inputs), inputs["attention_mask"])


def test_defaults_and_slices_of_larger_tensors(folder: Path, package: Package) -> None:
    ids = batch(4, 12)["input_ids"][1:, 3:]
    assert_same(package(input_ids=ids), eager(folder, {"input_ids": ids}), torch.ones_like(ids))


def test_a_folder_in_bf16_with_a_head_and_a_dense_one(tmp_path: Path) -> None:
    inputs = batch(3, 7)
    KronBertModel.from_pretrained(save_kron(tmp_path), dtype=torch.bfloat16).save_pretrained(tmp_path)
    package = load_package(tmp_path)
    assert package.info.dtype == "bf16"
    assert_same(package(**inputs), eager(tmp_path, inputs), inputs["attention_mask"], tol=0.1)
    for kind in ("KronBertForSequenceClassification", "BertModel"):
        save_kron(tmp_path, kind) if kind.startswith("Kron") else save_dense(tmp_path)
        package = load_package(tmp_path)
        assert (package.info.architecture, package.info.format) == (kind, "folder")
        assert_same(package(**inputs), eager(tmp_path, inputs, kind), inputs["attention_mask"])


@pytest.mark.parametrize(("layers", "message"), [(1, "has 2. weights that its conf"), (3, "lacks|missing")])
def test_a_configuration_of_another_depth(layers: int, message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    change_config(tmp_path / "model", num_hidden_layers=layers)
    with pytest.raises(OSError, match=message):
        load_package(tmp_path / "model")


@pytest.mark.slow
def test_a_pt2_runs_in_a_process_without_transformers(exported: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "small")
    save_tokenizer(tmp_path / "small")
    shutil.copy(exported, tmp_path / "small.pt2")
    code = documented("By torch") + (
        "import sys\nassert 'transformers' not in sys.modules\ntorch.save((ids, mask, hidden), 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    ids, mask, hidden = torch.load(tmp_path / "out.pt")
    wanted = eager(folder, {"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    assert_same({"hidden": hidden}, {"hidden": wanted}, mask)


def test_wrong_inputs(folder: Path) -> None:
    package, good = load_package(folder), batch(2, 4)
    with pytest.raises(ValueError, match=r"inputs: expected input_ids and optionally .* got attention_mask"):
        package(attention_mask=good["attention_mask"])
    with pytest.raises(ValueError, match="got input_ids, labels"):
        package(input_ids=good["input_ids"], labels=good["input_ids"])
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape of input_ids, \(2, 4\), got \(2, 3\)"):
        package(input_ids=good["input_ids"], attention_mask=good["attention_mask"][:, :3])
    with pytest.raises(TypeError, match=r"input_ids: expected a tensor of torch.int64 on the cpu, got torch.int32"):
        package(input_ids=good["input_ids"].int())
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


@pytest.mark.slow
def test_damage_is_an_oserror_of_one_line(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[: len(whole) // 2], whole[:-1], bytes(flipped), b"no archive at all"):
        path = tmp_path / "bad.pt2"
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"bad.pt2: damaged or truncated package: ") as error:
            load_package(path)
        assert "\n" not in str(error.value)


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], more: Mapping[str, bytes]):
    """The archive with its files changed, left out (None), or more of them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = change(entry.filename.partition("/")[2], old.read(entry))
            if content is not None:
                new.writestr(entry, content)
        for name, content in more.items():
            new.writestr(f"model/{name}", content)
    return target


def with_info(change: Callable[[dict[str, Any]], object]) -> Callable[[str, bytes], bytes]:
    def changed(name: str, content: bytes) -> bytes:
        if name != "extra/kron_kernels.json":
            return content
        info = json.loads(content)
        change(info)
        return json.dumps(info).encode()

    return changed


@pytest.mark.slow
def test_other_archives_are_errors(exported: Path, tmp_path: Path) -> None:
    for change, message in (
        (lambda name, content: content if "extra" not in name else None, "made by kron-kernels export"),
        (with_info(lambda info: info.update(version=1)), "expected package information of version 2"),
        (with_info(lambda info: info.pop("outputs")), "package information: 'outputs'"),
        (with_info(lambda info: info.update(more=1)), "package information: .*'more'"),
        (with_info(lambda info: info.update(format="onnx")), "expected the format export, got 'onnx'"),
        (lambda name, content: None if "models" in name else content, r"cannot load this package, made by torch 2\."),
    ):
        with pytest.raises(OSError, match=message):
            load_package(rewritten(exported, tmp_path / "changed.pt2", change, {}))


class Payload:
    """A pickle of it writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_pickles_and_machine_code_are_not_loaded(exported: Path, tmp_path: Path) -> None:
    buffer, trace = io.BytesIO(), tmp_path / "executed"
    torch.save(((), {"x": Payload(trace)}), buffer)

    def pickled(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else content

    def same(name: str, content: bytes) -> bytes | None:
        return None if "sample_inputs" in name else content

    for change, more, message in (
        (same, {"data/sample_inputs/model.pt": buffer.getvalue()}, "sample_inputs/model.pt, which is not loaded"),
        (same, {"data/constants/custom_obj_0": buffer.getvalue()}, "custom_obj_0, which is not loaded"),
        (same, {"data/aotinductor/model/code.so": b"ELF"}, "code.so, which is not loaded"),
        (pickled, {}, "expected plain tensors, got the pickle of .*; not loaded"),
    ):
        with pytest.raises(OSError, match=message):
            load_package(rewritten(exported, tmp_path / "evil.pt2", change, more))
    assert not trace.exists()
    # torch itself runs it: the test would see it.
    rewritten(exported, tmp_path / "evil.pt2", same, {"data/sample_inputs/model.pt": buffer.getvalue()})
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(tmp_path / "evil.pt2")
    assert trace.exists()


def test_no_file_and_no_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"package: expected a file or a model folder, got .*absent.pt2"):
        load_package(tmp_path / "absent.pt2")
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match=r"package: expected a file ending in .pt2 or .onnx, got .*model.bin"):
        load_package(tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError, match=r"model: expected a model folder, with config.json, got"):
        load_package(tmp_path)


def test_information_survives_json(folder: Path) -> None:
    info = load_package(folder).info
    assert PackageInfo.from_json(info.to_json()) == info
    assert (info.outputs, info.max_sequence) == (("last_hidden_state", "pooler_output"), 20)
