"""LowRankLinear: equal to the dense layer of its product, in every way a module is used, and its fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kron_kernels.nn import LowRankLinear, fit_low_rank


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_dense_layers(bias: bool) -> None:
    layer = LowRankLinear(7, 5, 3, bias, dtype=torch.float64)
    assert layer.dense_weight().shape == (5, 7)
    for lead in ((), (4,), (2, 3), (0,)):
        x = torch.randn(*lead, 7, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(), layer.bias))
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    names, leaves = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *leaves), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, *leaves))


def test_transforms_map_and_differentiate_it() -> None:
    layer = LowRankLinear(7, 5, 3)
    x, direction = torch.randn(4, 2, 7), torch.randn(4, 2, 7)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    value, tangent = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close((value, tangent), (layer(x), direction @ layer.dense_weight().T))


def test_initial_outputs_have_the_variance_of_nn_linear() -> None:
    layers = [LowRankLinear(64, 64, 4) for _ in range(200)]
    x = torch.randn(200, 64)
    outputs = torch.stack([layer(row) - layer.bias for layer, row in zip(layers, x, strict=True)])
    torch.testing.assert_close(outputs.var(), torch.tensor(1 / 3), rtol=0.15, atol=0)
    assert max(layer.bias.abs().max() for layer in layers) <= 1 / 8


def test_state_dict_copies_and_moves() -> None:
    layer = LowRankLinear(7, 5, 3)
    assert list(layer.state_dict()) == ["u", "v", "bias"]
    assert repr(layer) == "LowRankLinear(in_features=7, out_features=5, rank=3, bias=True)"
    x = torch.randn(4, 7)
    fresh = LowRankLinear(7, 5, 3)
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.bfloat16().dtype is layer(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.slow
@pytest.mark.compile
def test_compiles_once_for_every_number_of_tokens() -> None:
    layer = LowRankLinear(16, 12, 3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 8, 17):
            x = torch.randn(2, tokens, 16, requires_grad=True)
            leaves = [x, *layer.parameters()]
            got, wanted = compiled(x), layer(x)
            torch.testing.assert_close(got, wanted)
            torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), leaves) for each in (got, wanted)))


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_reproduces_the_dense_layer(bias: bool) -> None:
    dense = nn.Linear(12, 8, bias=bias).eval()
    layer, factors = fit_low_rank(dense, 8)
    assert not layer.training
    assert factors.relative_error < 1e-6
    assert fit_low_rank(copy.deepcopy(dense).bfloat16(), 2)[0].dtype is torch.bfloat16
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), dense(x))


def test_moment_and_mean_together_leave_the_deviations_to_the_factors() -> None:
    dense = nn.Linear(12, 8)
    x = torch.randn(400, 12) * torch.logspace(-1, 1, 12) + torch.linspace(5, -5, 12)
    moment, mean = x.T @ x / 400, x.mean(0)
    wanted = dense(x)
    errors = []
    for means in (None, mean):
        layer, factors = fit_low_rank(dense, 2, moment, means)
        error = layer(x) - wanted
        errors.append(error.norm() / (wanted - dense.bias).norm())
        torch.testing.assert_close(torch.tensor(factors.weighted_error), errors[-1], rtol=1e-3, atol=0)
    assert errors[1] < 0.9 * errors[0]
    layer, _ = fit_low_rank(dense, 2, None, mean)  # without a moment the mean error goes into the bias all the same
    torch.testing.assert_close((layer(x) - wanted).mean(0), torch.zeros(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [0, 6])
def test_bad_ranks(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank: expected 1 to min\(in, out\) = 5, got {rank}"):
        LowRankLinear(7, 5, rank)
    with pytest.raises(ValueError, match="rank: expected "):
        fit_low_rank(nn.Linear(7, 5), rank)
