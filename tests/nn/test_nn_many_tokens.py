"""KronLinear on many tokens: the dense product where terms save no work, the factors' own everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kron_kernels.nn import KronLinear
from kron_kernels.nn import linear as module

# 4 terms of 12x6 (x) 4x2 take as many multiply-adds as a dense 48x12, one term a quarter of them.
SHAPES = ((12, 6), (4, 2))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that were computed from the factors."""
    seen: list[int] = []
    inner = module.kron_matmul

    def spy(x, *rest, **options):
        seen.append(x.numel() // x.shape[-1])
        return inner(x, *rest, **options)

    monkeypatch.setattr(module, "kron_matmul", spy)
    return seen


def make(terms: int = 4, **options) -> KronLinear:
    return KronLinear(12, 48, SHAPES, terms, **options)


def test_many_tokens_of_terms_that_save_nothing_take_the_dense_product(products):
    layer, x = make(), torch.randn(2, 300, 12)
    y = layer(x)
    assert products == []
    assert y.shape == (2, 300, 48)
    twin = layer.to_linear()
    exact = F.linear(x.double(), twin.weight.double(), twin.bias.double())
    assert (y - exact).norm() <= 2 * (twin(x) - exact).norm()


def test_gradients_are_those_of_the_factors(products):
    layer, x = make(dtype=torch.float64), torch.randn(600, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.a, layer.b, layer.bias]
    grad = torch.randn(600, 48, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), leaves, grad)
    assert products == []
    want = torch.autograd.grad(module.kron_matmul(x, layer.a, layer.b, layer.bias), leaves, grad)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("terms", "tokens", "options"),
    [
        (4, 511, {}),
        (1, 600, {}),
        (2, 600, {}),  # five sixths of the work
        (4, 600, {"activation": "relu"}),
        (4, 600, {"dtype": torch.bfloat16}),
    ],
)
def test_all_else_is_computed_from_the_factors(terms, tokens, options, products):
    layer = make(terms, **options)
    layer(torch.randn(tokens, 12, dtype=layer.dtype))
    assert products == [tokens]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(600, 11), ValueError, "x: expected last dimension"),
        (torch.zeros(600, 12).double(), TypeError, "a: expected the dtype of x, torch.float64, got torch.float32"),
        ([0.0], TypeError, "x: expected a Tensor, got list"),
    ],
)
def test_bad_input_is_named_as_by_the_factors(x, error, message):
    with pytest.raises(error, match=message):
        make()(x)


def test_autocast_is_left_to_the_factors(products):
    with torch.autocast("cpu", torch.bfloat16):
        y = make()(torch.randn(600, 12))
    assert products == [600]
    assert y.dtype == torch.bfloat16


def test_exported_graphs_do_not_depend_on_the_number_of_tokens():
    layer = make().eval()
    program = torch.export.export(layer, (torch.randn(600, 12),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert any("kron_matmul" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 12)
    torch.testing.assert_close(program.module()(x), layer(x))
