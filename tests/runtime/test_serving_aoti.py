"""Packages compiled by AOTInductor: any shape, a process without transformers, machine code that is refused.

Two compilations in all: a model, and a program with every op that a model may call.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kron_kernels import AddNorm, kron_embedding, kron_ffn, kron_matmul_norm, kron_qkv
from kron_kernels.cli import main
from kron_kernels.runtime import Package, PackageInfo, load_package
from kron_kernels.runtime.export import write_package
from kron_kernels.runtime.onnx_form import FORMS
from tests.runtime.serving_models import assert_same, batch, documented, eager, save_dense, save_kron, save_tokenizer

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    out = folder.parent / "out" / "model.pt2"
    dense = save_dense(folder.parent / "dense")
    assert main(["export", str(folder), str(out), "--format", "aoti", "--dense", str(dense)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]
    return out


@pytest.fixture(scope="module")
def package(exported: Path) -> Package:
    return load_package(exported)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (2, 1), (5, 9)])
def test_any_batch_and_sequence(shape: tuple[int, int], folder: Path, package: Package) -> None:
    inputs = batch(*shape)
    assert_same(package(**inputs), eager(folder, inputs), inputs["attention_mask"])


def test_slices_of_larger_tensors(folder: Path, package: Package) -> None:
    inputs = {name: value[1:, 3:] for name, value in batch(4, 12).items()}
    assert_same(package(**inputs), eager(folder, inputs), inputs["attention_mask"])


FRESH = """
import sys
import torch
from kron_kernels.runtime import load_package

package = load_package(sys.argv[1])
inputs = torch.load(sys.argv[2])
torch.save(package(**inputs), sys.argv[3])
print([name for name in ("transformers", "onnx", "onnxruntime", "safetensors") if name in sys.modules])
"""


def test_runs_in_a_process_without_transformers(exported: Path, folder: Path, tmp_path: Path) -> None:
    inputs = batch(2, 7)
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [sys.executable, "-c", FRESH, str(exported), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert_same(torch.load(tmp_path / "outputs.pt"), eager(folder, inputs), inputs["attention_mask"])


def test_documented_code_runs(exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "small")
    save_tokenizer(tmp_path / "small")
    shutil.copy(exported, tmp_path / "small.pt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(documented("By torch"), names)
    assert names["ids"].shape == (2, 8)
    inputs = {"input_ids": names["ids"], "attention_mask": names["mask"]}
    wanted = eager(folder, inputs)["last_hidden_state"]
    assert_same({"hidden": names["hidden"]}, {"hidden": wanted}, names["mask"])


def test_the_ops_stay_ops(exported: Path) -> None:
    with zipfile.ZipFile(exported) as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".json"))
    assert re.search(r"kron_kernels[:.]", code)


def changed(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    """The package with its information changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("extra/kron_kernels.json"):
                info = json.loads(content)
                change(info)
                content = json.dumps(info).encode()
            new.writestr(entry, content)
    return target


def test_code_for_another_torch_or_processor_is_refused(exported: Path, tmp_path: Path) -> None:
    older = changed(exported, tmp_path / "older.pt2", lambda info: info.update(torch="2.11.0+cpu"))
    with pytest.raises(RuntimeError, match=r"older.pt2: compiled for torch 2.11.0\+cpu, this is torch .*; export the"):
        load_package(older)
    foreign = changed(exported, tmp_path / "foreign.pt2", lambda info: info.update(cpu="SVE"))
    with pytest.raises(RuntimeError, match=r"foreign.pt2: compiled on a processor with SVE, this one has"):
        load_package(foreign)


def test_damaged_machine_code_is_not_run(exported: Path, tmp_path: Path) -> None:
    content = bytearray(exported.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bit.pt2").write_bytes(content)
    with pytest.raises(OSError, match=r"bit.pt2: damaged or truncated package: wrong checksum of .*\.so"):
        load_package(tmp_path / "bit.pt2")
    (tmp_path / "cut.pt2").write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"cut.pt2: damaged or truncated package: "):
        load_package(tmp_path / "cut.pt2")


class Blocks(torch.nn.Module):
    """Every op for whole blocks, as an encoder would call them, on random weights of width 24."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"table": (1, 50, 6), "row": (1, 1, 4), "positions": (20, 24), "types": (2, 24)}
        shapes |= {f"a{i}": (2, 12, 12) for i in range(4)} | {f"b{i}": (2, 2, 2) for i in range(4)}
        shapes |= {"up_a": (1, 8, 2), "up_b": (1, 12, 12), "down_a": (1, 2, 8), "down_b": (1, 12, 12)}
        shapes |= {"weight": (24,), "bias": (24,), "wide": (96,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        positions = torch.arange(input_ids.shape[1])
        x = kron_embedding(
            input_ids,
            self.table,
            self.row,
            position_ids=positions,
            position_weight=self.positions,
            type_ids=token_type_ids,
            type_weight=self.types,
            norm_weight=self.weight,
            norm_bias=self.bias,
        )
        q, k, v = kron_qkv(x, [self.a0, self.a1, self.a2], [self.b0, self.b1, self.b2], [self.bias] * 3)
        (v,) = kron_qkv(v, [self.a0], [self.b0])  # no biases
        mixed = (q * k.sigmoid() + v) * attention_mask.unsqueeze(-1).to(x.dtype)
        x = kron_matmul_norm(mixed, self.a3, self.b3, self.bias, AddNorm(x, self.weight, self.bias))
        up, down = (self.up_a, self.up_b, self.wide), (self.down_a, self.down_b, self.bias)
        return {
            "normed": kron_ffn(x, *up, *down, norm=AddNorm(x, self.weight, self.bias)),
            "plain": kron_ffn(x, *up, *down, activation="gelu_tanh"),
        }


def blocks_program(blocks: Blocks) -> torch.export.ExportedProgram:
    inputs = batch(3, 7)
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=20)}
    with torch.no_grad():
        return torch.export.export(blocks, (), inputs, dynamic_shapes=dict.fromkeys(inputs, axes))


def info(format: str, dtype: str) -> PackageInfo:
    cpu = torch.backends.cpu.get_cpu_capability()
    return PackageInfo(format, "Blocks", dtype, ("normed", "plain"), 20, 50, 2, torch.__version__, "0", cpu)


BLOCK_OPS = {"kron_embedding": 1, "kron_qkv": 2, "kron_matmul_norm": 1, "kron_ffn": 2}


def test_every_op_compiled_in_bf16(tmp_path: Path) -> None:
    blocks = Blocks(torch.bfloat16)
    assert write_package(blocks_program(blocks), info("aoti", "bf16"), tmp_path / "blocks.pt2") == BLOCK_OPS
    package = load_package(tmp_path / "blocks.pt2")
    for shape in ((1, 1), (2, 20)):
        inputs = batch(*shape)
        with torch.no_grad():
            wanted = blocks(**inputs)
        for name, got in package(**inputs).items():
            torch.testing.assert_close(got, wanted[name], rtol=5e-2, atol=5e-2)


def test_every_op_in_the_form_of_onnx() -> None:
    blocks = Blocks(torch.float32)
    program = blocks_program(blocks)
    plain = program.run_decompositions(FORMS)
    assert not [node for node in plain.graph.nodes if "kron_kernels" in str(node.target)]
    inputs = batch(4, 5)
    with torch.no_grad():
        wanted = blocks(**inputs)
        got = plain.module()(**inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
