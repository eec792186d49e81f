"""The examples of adapters, embeddings and relations: each runs, and computes what its materialised way does."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.cases import assert_accurate

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


def for_example(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True)


def run(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of its squares."""
    y = function()
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


def assert_as_materialised(module: nn.Module, forward, materialised) -> None:
    """``forward(module)`` and its gradients against ``materialised(module)`` in fp64, and its own in fp32."""
    results = []
    for function, dtype in ((forward, torch.float32), (materialised, torch.float32), (materialised, torch.float64)):
        module.to(dtype)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        results.append(run(lambda function=function: function(module), trained))
    names = ["output", *(name for name, parameter in module.named_parameters() if parameter.requires_grad)]
    for name, *tensors in zip(names, *results, strict=True):
        assert_accurate(*tensors, name)


@for_example("krona")
def test_krona_trains_saves_and_merges(example, capsys):
    found = example.main(steps=30)
    assert found["share"] < 0.005
    assert found["fall"] < 0.97
    assert found["reloaded"] == 0
    assert found["merged"] < 1e-5
    assert found["start"] == 0
    assert "trained: 512 parameters" in capsys.readouterr().out


@for_example("vit")
def test_vit_is_converted_saved_and_loaded(example, capsys):
    found = example.main(hidden=64, layers=1)
    assert found["compression"] > 3
    assert found["error"] < 1e-5
    assert found["reloaded"] == 0
    assert "parameters" in capsys.readouterr().out


@for_example("kadaptation")
def test_kadaptation(example, capsys):
    found = example.main(hidden=64)
    assert found["trained"] == 4**3 + 4 * 4 * (16 + 16)  # A once, u and v of four layers
    assert found["error"] < 1e-5
    assert found["start"] == 0
    assert "multiply-adds" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [1, 3])
@for_example("kadaptation")
def test_kadaptation_is_its_sum_of_products(example, rank):
    layer = example.KAdaptation(nn.Linear(30, 24), nn.Parameter(torch.randn(4, 3, 5)), rank)
    nn.init.normal_(layer.u)
    x = torch.randn(2, 6, 30)

    def built(layer: nn.Module) -> torch.Tensor:
        return F.linear(x.to(layer.a.dtype), layer.base.weight + layer.delta_weight(), layer.base.bias)

    assert_as_materialised(layer, lambda layer: layer(x), built)


@for_example("kadaptation")
def test_kadaptation_shares_the_left_factors(example):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 12), "c": nn.Linear(8, 8)})
    first, second = example.adapt_(model, ("a", "b"), terms=2)
    assert first.a is second.a
    assert isinstance(model["c"], nn.Linear)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"a.a", "a.u", "a.v", "b.u", "b.v"}


@for_example("moka")
def test_moka(example, capsys):
    found = example.main(hidden=48)
    assert found["trained"] < 48 * 48
    assert found["error"] < 1e-5
    assert found["start"] == 0
    assert "trained" in capsys.readouterr().out


@for_example("moka")
def test_moka_is_its_gated_sum_of_terms_of_unequal_shapes(example):
    shapes = [((6, 3), (4, 10)), ((2, 15), (12, 2)), ((24, 5), (1, 6))]
    layer = example.KroneckerMixture(nn.Linear(30, 24), shapes)
    for b in layer.b:
        nn.init.normal_(b)
    nn.init.normal_(layer.gates)
    x = torch.randn(9, 30)

    def built(layer: nn.Module) -> torch.Tensor:
        gates = layer.gates.softmax(0)
        delta = sum(gate * torch.kron(a, b) for gate, a, b in zip(gates, layer.a, layer.b, strict=True))
        return F.linear(x.to(delta.dtype), layer.base.weight + delta, layer.base.bias)

    assert_as_materialised(layer, lambda layer: layer(x), built)


@for_example("morphte")
def test_morphte(example, capsys):
    found = example.main(words=200, morphemes=30, dim=50, rank=2)
    assert found["compression"] > 10
    assert found["error"] < 1e-5
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("dim", [27, 20])
@for_example("morphte")
def test_morphte_is_its_sum_of_products_of_three(example, dim):
    layer = example.MorphemeEmbedding(torch.randint(9, (40, 3)), dim, rank=3)
    assert layer.table.shape[1:] == (3, 3)
    ids = torch.randint(40, (5, 7))
    assert_as_materialised(layer, lambda layer: layer(ids), lambda layer: example.materialised(layer)[ids])


@for_example("morphte")
def test_morphte_draws_rows_of_unit_variance(example):
    layer = example.MorphemeEmbedding(torch.randint(500, (3000, 3)), 64, rank=5)
    assert 0.7 < float(layer(torch.arange(3000)).detach().var()) < 1.4


@for_example("krone")
def test_krone(example, capsys):
    found = example.main(entities=40, relations=5, n1=3, n2=4)
    assert found["compression"] > 5
    assert found["error"] < 1e-5
    assert "parameters" in capsys.readouterr().out


@for_example("krone")
def test_krone_is_its_relations_matrices(example):
    model = example.KroneckerRelations(30, 6, 3, 5)
    heads, kinds = torch.randint(30, (17,)), torch.tensor([4, 0, 4, 1, 1, 3, 0, 4, 0, 1, 3, 3, 4, 0, 0, 1, 4])
    assert_as_materialised(
        model, lambda model: model(heads, kinds), lambda model: example.materialised(model, heads, kinds)
    )
