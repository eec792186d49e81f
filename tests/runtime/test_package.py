"""Packages loaded and run: folders and .pt2 files, what goes in, and files that are not loaded."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kron_kernels.runtime import Package, export_model, load_package
from tests.runtime.folders import (
    SIZES,
    assert_same,
    batch,
    eager,
    save_dense,
    save_kron,
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


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (5, 9)])
def test_any_batch_and_sequence(shape: tuple[int, int], folder: Path, package: Package) -> None:
    inputs = batch(*shape)
    assert_same(package(**inputs), eager(folder, inputs), inputs["attention_mask"])


@pytest.mark.parametrize("kind", ["KronBertForSequenceClassification", "BertModel"])
def test_a_folder_with_a_head_and_a_dense_one(kind: str, tmp_path: Path) -> None:
    inputs = batch(3, 7)
    save_kron(tmp_path, kind) if kind.startswith("Kron") else save_dense(tmp_path)
    package = load_package(tmp_path)
    assert (package.info.architecture, package.info.format) == (kind, "folder")
    assert_same(package(**inputs), eager(tmp_path, inputs, kind), inputs["attention_mask"])


@pytest.mark.slow
def test_a_pt2_runs_in_a_process_without_transformers(exported: Path, folder: Path, tmp_path: Path) -> None:
    inputs = batch(2, 5)
    torch.save(inputs, tmp_path / "inputs")
    code = (
        "import sys, torch\nfrom kron_kernels.runtime import load_package\nassert 'transformers' not in sys.modules\n"
        f"torch.save(load_package({str(exported)!r})(**torch.load('inputs')), 'outputs')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_same(torch.load(tmp_path / "outputs"), eager(folder, inputs), inputs["attention_mask"])


def test_wrong_inputs(folder: Path) -> None:
    package, good = load_package(folder), batch(2, 4)
    with pytest.raises(ValueError, match=r"inputs: expected input_ids and optionally .* got attention_mask"):
        package(attention_mask=good["attention_mask"])
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape of input_ids, \(2, 4\), got \(2, 3\)"):
        package(input_ids=good["input_ids"], attention_mask=good["attention_mask"][:, :3])
    with pytest.raises(TypeError, match=r"input_ids: expected a tensor of torch.int64 on the cpu, got torch.int32"):
        package(input_ids=good["input_ids"].int())
    for shape in ((0, 4), (2, 21), (4,)):
        with pytest.raises(ValueError, match="with at least one row and 1 to 20 columns, got"):
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
    path = tmp_path / "bad.pt2"
    for content in (b"", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"bad.pt2: damaged or truncated package: "):
            load_package(path)


class Payload:
    """A pickle of it makes a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.slow
def test_pickles_and_machine_code_are_not_loaded(exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(((), {"x": Payload()}), buffer)
    payload, plain = buffer.getvalue(), (b'"use_pickle": false', b'"use_pickle": false')

    def rewrite(without: str, added: dict[str, bytes], swap: tuple[bytes, bytes] = plain) -> None:
        with zipfile.ZipFile(exported) as old, zipfile.ZipFile("evil.pt2", "w") as new:
            for entry in old.infolist():
                if without not in entry.filename.partition("/")[2]:
                    new.writestr(entry, old.read(entry).replace(*swap))
            for name, content in added.items():
                new.writestr(f"model/data/{name}", content)

    for without, added, swap, message in (
        ("sample_inputs", {"constants/custom_obj_0": payload}, plain, "custom_obj_0, which is not loaded"),
        ("sample_inputs", {"aotinductor/model/code.so": b"ELF"}, plain, "code.so, which is not loaded"),
        ("extra", {}, plain, "made by kron-kernels export"),
        ("sample_inputs", {}, (plain[0], b'"use_pickle": true'), "expected plain tensors, got the pickle of .*; not"),
        ("sample_inputs", {"sample_inputs/model.pt": payload}, plain, "sample_inputs/model.pt, which is not loaded"),
    ):
        rewrite(without, added, swap)
        with pytest.raises(OSError, match=message):
            load_package("evil.pt2")
    assert not Path("executed").exists()
    # torch itself runs the last of these: the test would see it.
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load("evil.pt2")
    assert Path("executed").exists()


def test_no_file_and_no_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"package: expected a file or a model folder, got .*absent.pt2"):
        load_package(tmp_path / "absent.pt2")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"package: expected a file ending in .pt2 or .onnx, got .*model.bin"):
        load_package(tmp_path / "model.bin")
