"""KronLinear: equal to the dense layer it stands for, in every way a module is used."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kron_kernels.nn import KronLinear, fit_linear
from kron_kernels.nn import linear as module

SHAPES = {
    "tiny_b": ((6, 4), (2, 3)),
    "tiny_a_expands": ((4, 2), (6, 5)),
    "tiny_a_contracts": ((2, 4), (3, 5)),
    "row_vector_b": ((7, 3), (1, 4)),
}


def make_linear(shapes, **options) -> KronLinear:
    (m1, n1), (m2, n2) = shapes
    return KronLinear(n1 * n2, m1 * m2, shapes, **options)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("terms", [1, 3])
def test_forward_is_the_dense_layer(shapes, terms):
    layer = make_linear(shapes, terms=terms, dtype=torch.float64)
    weight = sum(torch.kron(a, b) for a, b in zip(layer.a, layer.b, strict=True))
    for lead in ((), (5,), (2, 3)):
        x = torch.randn(*lead, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    layer.activation = "gelu"
    torch.testing.assert_close(layer(x), F.gelu(F.linear(x, weight, layer.bias)))


@pytest.mark.parametrize("bias", [True, False])
def test_full_terms_reproduce_the_dense_layer_both_ways(bias):
    dense = nn.Linear(12, 8, bias=bias).eval()
    layer = KronLinear.from_linear(dense, (4, 2), terms=8)
    assert not layer.training
    assert KronLinear.from_linear(copy.deepcopy(dense).bfloat16(), (4, 2)).dtype is torch.bfloat16
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), dense(x))
    back = layer.to_linear()
    torch.testing.assert_close(back.weight, dense.weight)
    assert (back.bias is None) == (not bias)


def test_moment_and_mean_together_leave_the_deviations_to_the_factors():
    dense = nn.Linear(12, 8)
    x = torch.randn(400, 12) * torch.logspace(-1, 1, 12) + torch.linspace(5, -5, 12)
    moment, mean = x.T @ x / 400, x.mean(0)
    wanted = dense(x)
    errors = []
    for means in (None, mean):
        layer, factors = fit_linear(dense, (4, 2), 1, moment, means)
        error = layer(x) - wanted
        errors.append(error.norm() / (wanted - dense.bias).norm())
        torch.testing.assert_close(torch.tensor(factors.weighted_error), errors[-1], rtol=1e-3, atol=0)
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("terms", [1, 4])
def test_initial_outputs_have_the_variance_of_nn_linear(terms):
    n, draws = 64, 300
    x = torch.randn(draws, n)
    layers = [KronLinear(n, n, ((16, 16), (4, 4)), terms) for _ in range(draws)]
    outputs = torch.stack([layer(row) - layer.bias for layer, row in zip(layers, x, strict=True)])
    # nn.Linear: entries uniform in +-1/sqrt(n), so variance 1/(3n) and 1/3 for the sum over n inputs
    torch.testing.assert_close(outputs.var(), torch.tensor(1 / 3), rtol=0.1, atol=0)
    assert max(layer.bias.abs().max() for layer in layers) <= n**-0.5


def test_state_dict_copies_and_moves():
    layer = make_linear(SHAPES["tiny_b"], terms=2)
    assert list(layer.state_dict()) == ["a", "b", "bias"]
    x = torch.randn(3, layer.in_features)
    fresh = make_linear(SHAPES["tiny_b"], terms=2)
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert layer.double()(x.double()).dtype is torch.float64


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    layer = make_linear(SHAPES["tiny_a_expands"], terms=2, activation="relu")
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), list(layer.parameters())), expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((12, 8, ((4, 2), (2, 5))), r"shapes: .*\(8, 12\), got 4x2 \(x\) 2x5 of shape \(8, 10\)"),
        ((12, 8, ((4, 2), (2, 6)), 0), "terms: expected an integer of at least 1, got 0"),
        ((12, 8, ((4, 2), (2, 6)), 1, True, "tanh"), "activation: .*got 'tanh'"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        KronLinear(*arguments)
    with pytest.raises(ValueError, match=r"activation: expected None for a plain nn.Linear, got 'gelu'"):
        make_linear(SHAPES["tiny_b"], activation="gelu").to_linear()


# 4 terms of 12x6 (x) 4x2 take as many multiply-adds as a dense 48x12, one term a quarter of them.
@pytest.mark.parametrize(
    ("terms", "tokens", "options", "dense"),
    [
        (4, 600, {}, True),
        (4, 511, {}, False),
        (2, 600, {}, False),  # five sixths of the work
        (4, 600, {"activation": "relu"}, False),
        (4, 600, {"dtype": torch.bfloat16}, False),
    ],
)
def test_many_tokens_of_terms_that_save_nothing_take_the_dense_product(terms, tokens, options, dense, monkeypatch):
    seen, inner = [], module.kron_matmul
    monkeypatch.setattr(module, "kron_matmul", lambda x, *rest, **more: seen.append(x) or inner(x, *rest, **more))
    layer = KronLinear(12, 48, ((12, 6), (4, 2)), terms, **{"dtype": torch.float64, **options})
    x = torch.randn(tokens, 12, dtype=layer.dtype, requires_grad=True)
    y = layer(x)
    assert bool(seen) != dense
    want = inner(x, layer.a, layer.b, layer.bias, **({"activation": "relu"} if "activation" in options else {}))
    torch.testing.assert_close(y, want)
    leaves, grad = [x, layer.a, layer.b, layer.bias], torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(each, leaves, grad) for each in (y, want)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
    assert len(seen) == 1 + (not dense)


@pytest.mark.slow
def test_exported_graphs_do_not_depend_on_the_number_of_tokens():
    layer = KronLinear(12, 48, ((12, 6), (4, 2)), 4).eval()
    program = torch.export.export(layer, (torch.randn(600, 12),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert any("kron_matmul" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 12)
    torch.testing.assert_close(program.module()(x), layer(x))
