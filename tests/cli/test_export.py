"""The command ``kron-kernels export``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kron_kernels.cli import main
from kron_kernels.runtime import load_package
from tests.runtime.folders import save_dense, save_kron

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model")


@pytest.mark.slow
def test_prints_sizes_errors_and_ops(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out, dense = tmp_path / "model.pt2", save_dense(tmp_path / "dense")
    out.write_text("old")
    arguments = ["export", str(folder), str(out), "--dense", str(dense)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"kron-kernels export: error: out: {out} exists; remove it, or ask to overwrite it\n")
    assert out.read_text() == "old"
    assert main([*arguments, "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {words[0]: words[-1] for words in map(str.split, lines) if words}
    assert rows["package"] == f"{out.stat().st_size:,}"
    assert rows["model"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert rows["dense"] == f"{(dense / 'model.safetensors').stat().st_size:,}"
    assert rows["last_hidden_state"] == "1e-04"
    assert any(name.startswith("kron_") for name in rows)
    assert lines[-1] == f"KronBertModel as export, fp32, in {out}"


@pytest.mark.slow
def test_json(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "model.pt2"
    assert main(["export", str(folder), str(out), "--dtype", "bf16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["package_bytes"] == out.stat().st_size
    assert (report["format"], report["dtype"], report["dense_bytes"]) == ("export", "bf16", None)
    assert report["errors"].keys() == {"last_hidden_state", "pooler_output"}
    assert max(report["errors"].values()) <= report["tolerance"]
    assert load_package(out).info.dtype == "bf16"


def test_wrong_requests_are_one_line(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "a.pt2")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kron-kernels export: error: model: expected a model folder, with config.json and weights")
    assert error.count("\n") == 1
    assert main(["export", str(folder), str(tmp_path / "a.bin")]) == 2
    assert "out: expected a name ending in .pt2 or .onnx" in capsys.readouterr().err
