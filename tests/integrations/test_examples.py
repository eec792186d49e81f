"""The examples of adapters, embeddings and relations: each runs, and computes what its built weight does."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kron_kernels.testing.accuracy import assert_accurate

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


def for_example(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True)


def assert_as_built(module: nn.Module, forward, built) -> None:
    """``forward(module)`` and its gradients against ``built(module)`` in fp64, and its own in fp32."""
    results = []
    for function, dtype in ((forward, torch.float32), (built, torch.float32), (built, torch.float64)):
        module.to(dtype)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        y = function(module)
        results.append([y, *torch.autograd.grad(y.square().sum(), tuple(trained.values()))])
    for name, *tensors in zip(["output", *trained], *results, strict=True):
        assert_accurate(*tensors, name)


# Options of ``main``, what must be zero, and what must be above a bound.
RUNS = {
    "krona": ({"steps": 30}, ("reloaded", "start"), {}),
    "vit": ({"hidden": 64, "layers": 1}, ("reloaded",), {"compression": 3}),
    "kadaptation": ({"hidden": 64}, ("start",), {}),
    "moka": ({"hidden": 48}, ("start",), {}),
    "adakron": ({"hidden": 48}, ("start",), {}),
    "morphte": ({"words": 200, "morphemes": 30, "dim": 50, "rank": 2}, (), {"compression": 10}),
    "krone": ({"entities": 40, "relations": 5, "n1": 3, "n2": 4}, (), {"compression": 5}),
}


@pytest.mark.parametrize("example", RUNS, indirect=True)
def test_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options, zero, least = RUNS[example.__name__]
    found = example.main(**options)
    assert all(found[name] == 0 for name in zero)
    assert all(found[name] > bound for name, bound in least.items())
    assert found.get("error", found.get("merged")) < 1e-5
    assert found.get("fall", 0) < 0.97
    assert "parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("quickstart")
    assert "loaded model computes the same: True" in capsys.readouterr().out


def test_peft_lokr_trains_as_peft_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("peft_lokr")
    monkeypatch.setattr("sys.argv", ["peft_lokr", "--hidden", "32", "--steps", "3"])
    losses = example.main()
    assert losses["kron_kernels"] == pytest.approx(losses["PEFT"], rel=1e-4)
    assert losses["PEFT"][-1] < losses["PEFT"][0], "it learns"
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["PEFT", "kron_kernels"]


@for_example("kadaptation")
def test_kadaptation_is_its_sum_of_products(example: ModuleType) -> None:
    layer = example.KAdaptation(nn.Linear(30, 24), nn.Parameter(torch.randn(4, 3, 5)), rank=3)
    nn.init.normal_(layer.u)
    x = torch.randn(2, 6, 30)

    def forward(layer: nn.Module) -> Tensor:
        return layer(x.to(layer.a.dtype))

    def built(layer: nn.Module) -> Tensor:
        return F.linear(x.to(layer.a.dtype), layer.base.weight + layer.delta_weight(), layer.base.bias)

    assert_as_built(layer, forward, built)


@for_example("moka")
def test_moka_is_its_gated_sum_of_terms_of_unequal_shapes(example: ModuleType) -> None:
    shapes = [((6, 3), (4, 10)), ((2, 15), (12, 2)), ((24, 5), (1, 6))]
    layer = example.KroneckerMixture(nn.Linear(30, 24), shapes)
    for parameter in (*layer.b, layer.gates):
        nn.init.normal_(parameter)
    x = torch.randn(9, 30)

    def built(layer: nn.Module) -> Tensor:
        gates = layer.gates.softmax(0)
        delta = sum(gate * torch.kron(a, b) for gate, a, b in zip(gates, layer.a, layer.b, strict=True))
        return F.linear(x.to(delta.dtype), layer.base.weight + delta, layer.base.bias)

    assert_as_built(layer, lambda layer: layer(x), built)


@for_example("adakron")
def test_adakron_projects_the_product_of_two_nets_outputs(example: ModuleType) -> None:
    layer = example.AdaKron(nn.Linear(10, 24), 10, ((4, 3), (6, 5)), terms=2)
    nn.init.normal_(layer.b)
    x = torch.randn(7, 10)
    assert_as_built(layer, lambda layer: layer(x), lambda layer: example.reference(layer, x.to(layer.a.dtype)))
    assert layer.float()(x.view(1, 7, 10)).shape == (1, 7, 24)


@for_example("morphte")
def test_morphte_is_its_sum_of_products_of_three(example: ModuleType) -> None:
    layer = example.MorphemeEmbedding(torch.randint(9, (40, 3)), 20, rank=3)
    assert layer.table.shape[1:] == (3, 3)
    ids = torch.randint(40, (5, 7))
    assert_as_built(layer, lambda layer: layer(ids), lambda layer: example.reference(layer)[ids])


@for_example("krone")
def test_krone_is_its_relations_matrices(example: ModuleType) -> None:
    model = example.KroneckerRelations(30, 6, 3, 5)
    heads, kinds = torch.randint(30, (17,)), torch.tensor([4, 0, 4, 1, 1, 3, 0, 4, 0, 1, 3, 3, 4, 0, 0, 1, 4])
    assert_as_built(model, lambda model: model(heads, kinds), lambda model: example.reference(model, heads, kinds))
