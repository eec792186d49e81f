"""ONNX packages: their structure, their outputs in onnxruntime, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kron_kernels.runtime import ExportReport, Package, export_model, load_package
from kron_kernels.runtime.onnx_form import FORMS, product
from kron_kernels.schemas.products import kron_matmul
from kron_kernels.schemas.reference import kron_matmul as reference_kron_mm
from tests.runtime.serving_models import KRON, SIZES, assert_same, batch, documented, eager, save_dense, save_kron

for name in ("onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason="the extra 'serving' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'serving' is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kron(tmp_path_factory.mktemp("kron") / "model", "KronBertForMaskedLM")


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[Path, ExportReport]:
    out = folder.parent / "model.onnx"
    return out, export_model(folder, out, "onnx")


@pytest.fixture(scope="module")
def package(exported: tuple[Path, ExportReport]) -> Package:
    return load_package(exported[0])


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (2, 1), (5, 9)])
def test_any_batch_and_sequence(shape: tuple[int, int], folder: Path, package: Package) -> None:
    inputs = batch(*shape)
    assert_same(package(**inputs), eager(folder, inputs, "KronBertForMaskedLM"), inputs["attention_mask"])


def test_slices_of_larger_tensors(folder: Path, package: Package) -> None:
    inputs = {name: value[1:, 3:] for name, value in batch(4, 12).items()}
    assert_same(package(**inputs), eager(folder, inputs, "KronBertForMaskedLM"), inputs["attention_mask"])


def test_two_matmuls_a_term_and_no_weight_built(exported: tuple[Path, ExportReport]) -> None:
    path, report = exported
    graph = onnx.load(path).graph
    layers = SIZES["num_hidden_layers"]
    terms = layers * (4 * KRON.rules["attention"].terms + 2) + 1  # the decoder is the last
    # Two of attention itself in each layer, one of the dense layer before the decoder.
    assert report.nodes["MatMul"] == 2 * terms + 2 * layers + 1
    assert report.nodes == dict(Counter(node.op_type for node in graph.node))
    dense = SIZES["hidden_size"] ** 2
    large = [tensor for tensor in graph.initializer if torch.Size(tensor.dims).numel() >= dense]
    assert [list(tensor.dims) for tensor in large] == [[48, 48]]  # that dense layer's own
    # The table of the embedding is the decoder's too: it is there once, with as many rows as the vocabulary.
    assert sum(SIZES["vocab_size"] in tensor.dims and len(tensor.dims) > 1 for tensor in graph.initializer) == 1


def test_names_and_axes(exported: tuple[Path, ExportReport]) -> None:
    model = onnx.load(exported[0])
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    free = ["batch", "sequence"]
    assert axes == {"input_ids": free, "attention_mask": free, "token_type_ids": free, "logits": [*free, 50]}
    # Nothing of what the exporter notes about each value's origin.
    assert b"pkg.torch" not in exported[0].read_bytes()


SHAPES = {
    "tiny-b": ((24, 24), (2, 2)),
    "tiny-b-wide": ((24, 6), (2, 8)),
    "tiny-a-expands": ((8, 2), (24, 24)),
    "tiny-a-contracts": ((2, 8), (24, 24)),
    "balanced": ((6, 8), (8, 6)),
    "row-vector-b": ((50, 6), (1, 8)),
}


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_form_of_one_layer(shapes, terms: int) -> None:
    (m1, n1), (m2, n2) = shapes
    a, b, bias = torch.randn(terms, m1, n1), torch.randn(terms, m2, n2), torch.randn(m1 * m2)
    x = torch.randn(3, n1 * n2)
    torch.testing.assert_close(product(x, a, b, bias), reference_kron_mm(x, a, b, bias), rtol=1e-4, atol=1e-4)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bias = (torch.nn.Parameter(tensor) for tensor in (a, b, bias))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kron_matmul(x, self.a, self.b, self.bias, 1)

    with torch.no_grad():
        program = torch.export.export(Layer(), (x[:1],)).run_decompositions(FORMS)
    matmuls = [
        node
        for node in program.graph.nodes
        if node.target in (torch.ops.aten.matmul.default, torch.ops.aten.mm.default)
    ]
    assert len(matmuls) == 2 * terms
    # Multiply-adds from the shapes that the graph gives: those of the cheaper order, for one token.
    spent = 0
    for node in matmuls:
        left, _ = (argument.meta["val"].shape for argument in node.args)
        spent += node.meta["val"].numel() * left[-1]
    assert spent == terms * min(n2 * m1 * (n1 + m2), n1 * m2 * (n2 + m1))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, ``model``, and the same as ``small.onnx`` beside it."""
    folder = tmp_path_factory.mktemp("dense")
    assert export_model(save_dense(folder / "model"), folder / "small.onnx", "onnx").architecture == "BertModel"
    return folder


def test_a_dense_model(dense: Path) -> None:
    inputs = batch(3, 5)
    got = load_package(dense / "small.onnx")(**inputs)
    assert_same(got, eager(dense / "model", inputs, "BertModel"), inputs["attention_mask"])


def test_documented_code_runs_without_torch(dense: Path) -> None:
    code = documented("By onnxruntime alone") + "import sys\nassert 'torch' not in sys.modules\nprint(hidden.tolist())"
    done = subprocess.run([sys.executable, "-c", code], cwd=dense, capture_output=True, text=True, check=True)
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    wanted = eager(dense / "model", inputs, "BertModel")["last_hidden_state"]
    assert_same({"hidden": torch.tensor(json.loads(done.stdout))}, {"hidden": wanted}, ids != 0)


def test_wrong_outputs_leave_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bias(x, a, b, bias, activation, packed=None):
        return product(x, a, b, None, activation)

    monkeypatch.setitem(FORMS, kron_matmul, without_bias)
    (tmp_path / "old.onnx").write_text("mine")
    with pytest.raises(RuntimeError, match=r"does not agree with eager torch: logits by .*, allowed 1e-04"):
        export_model(folder, tmp_path / "old.onnx", "onnx", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_text() == "mine"


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_truncated(kept: float, exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    whole = exported[0].read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(OSError, match=r"cut.onnx: damaged or truncated package: .*ONNXRuntimeError") as error:
        load_package(tmp_path / "cut.onnx")
    assert "\n" not in str(error.value)


def test_other_onnx_files_are_refused(exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    model = onnx.load(exported[0])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(OSError, match="expected a package made by kron-kernels export"):
        load_package(tmp_path / "foreign.onnx")
    model.metadata_props.add(key="kron_kernels", value=json.dumps({"version": 2}))
    onnx.save(model, tmp_path / "newer.onnx")
    with pytest.raises(OSError, match="expected package information of version 1"):
        load_package(tmp_path / "newer.onnx")


def test_a_missing_package_names_the_extra(exported, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"needs onnxruntime: pip install 'kron_kernels\[serving\]'"):
        load_package(exported[0])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RuntimeError, match=r"needs onnx: pip install 'kron_kernels\[serving\]'"):
        export_model(folder, tmp_path / "out.onnx", "onnx")
    assert not list(tmp_path.iterdir())
