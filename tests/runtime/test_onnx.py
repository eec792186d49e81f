"""ONNX packages: their structure, their outputs in onnxruntime, and files that are not loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kron_kernels.runtime import ExportReport, export_model, load_package
from kron_kernels.runtime import onnx as forms
from kron_kernels.schemas import reference
from tests.runtime.folders import KRON, SIZES, assert_same, batch, documented, eager, save_dense, save_kron

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
def test_two_matmuls_a_term_and_no_weight_built(exported: tuple[Path, ExportReport]) -> None:
    path, report = exported
    graph = onnx.load(path).graph
    layers = SIZES["num_hidden_layers"]
    terms = layers * (4 * KRON.rules["attention"].terms + 2) + 1  # the decoder is the last
    # Two of attention itself in each layer, one of the dense layer before the decoder.
    assert report.nodes["MatMul"] == 2 * terms + 2 * layers + 1
    assert report.nodes == dict(Counter(node.op_type for node in graph.node))
    large = [list(tensor.dims) for tensor in graph.initializer if torch.Size(tensor.dims).numel() >= 48 * 48]
    assert large == [[48, 48]]  # that dense layer's own
    # The table of the embedding is the decoder's too: it is there once, with as many rows as the vocabulary.
    assert sum(SIZES["vocab_size"] in tensor.dims and len(tensor.dims) > 1 for tensor in graph.initializer) == 1
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    free = ["batch", "sequence"]
    assert axes == {"input_ids": free, "attention_mask": free, "token_type_ids": free, "logits": [*free, 50]}
    # Nothing of what the exporter notes about each value's origin.
    assert b"pkg.torch" not in path.read_bytes()


SHAPES = {
    "tiny-b": ((24, 6), (2, 8), 3),
    "tiny-a-expands": ((8, 2), (24, 24), 1),
    "tiny-a-contracts": ((2, 8), (24, 24), 3),
    "balanced": ((6, 8), (8, 6), 1),
    "row-vector-b": ((50, 6), (1, 8), 1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_form_of_one_layer(case: str) -> None:
    (m1, n1), (m2, n2), terms = SHAPES[case]
    a, b, bias = torch.randn(terms, m1, n1), torch.randn(terms, m2, n2), torch.randn(m1 * m2)
    x = torch.randn(3, n1 * n2)
    wanted = reference.kron_matmul(x, a, b, bias)
    torch.testing.assert_close(forms.kron_matmul(x, a, b, bias), wanted, rtol=1e-4, atol=1e-4)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.kron_kernels.kron_matmul(x, a, b, bias, 1)

    program = torch.export.export(Layer(), (x[:1],)).run_decompositions(forms.DECOMPOSITIONS)
    matmuls = (torch.ops.aten.matmul.default, torch.ops.aten.mm.default)
    nodes = [node for node in program.graph.nodes if node.target in matmuls]
    assert len(nodes) == 2 * terms
    # Multiply-adds from the shapes that the graph gives: those of the cheaper order, for one token.
    spent = sum(node.meta["val"].numel() * node.args[0].meta["val"].shape[-1] for node in nodes)
    assert spent == terms * min(n2 * m1 * (n1 + m2), n1 * m2 * (n2 + m1))


@pytest.mark.slow
def test_documented_code_runs_a_dense_model_without_torch(tmp_path: Path) -> None:
    assert export_model(save_dense(tmp_path / "model"), tmp_path / "small.onnx").architecture == "BertModel"
    code = documented("By onnxruntime alone") + "import sys\nassert 'torch' not in sys.modules\nprint(hidden.tolist())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    wanted = eager(tmp_path / "model", inputs, "BertModel")["last_hidden_state"]
    assert_same({"hidden": torch.tensor(json.loads(done.stdout))}, {"hidden": wanted}, ids != 0)


@pytest.mark.slow
def test_damage_and_other_files_are_errors(exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    whole, path = exported[0].read_bytes(), tmp_path / "bad.onnx"
    for content in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"bad.onnx: damaged (or truncated )?package: ") as error:
            load_package(path)
        assert "\n" not in str(error.value)
    name, digits = whole.index(b"kron_kernels_sha256"), whole.index(b"kron_kernels_sha256") + 21
    for place in (len(whole) // 3, len(whole) // 2, name, digits, digits + 63):
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
