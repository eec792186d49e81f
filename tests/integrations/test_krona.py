"""KronA adapters: the products by their definition; only they are trained, saved and loaded."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from kron_kernels.convert.presets import KronConfig
from kron_kernels.convert.rules import LowRankRule, ShapeRule
from kron_kernels.integrations.krona import (
    KronA,
    KronABlock,
    KronAdapter,
    add_krona_,
    freeze_but_krona_,
    load_krona_,
    remove_krona_,
    save_krona,
)
from kron_kernels.schemas import reference
from kron_kernels.testing.accuracy import assert_accurate

# (m1, n1), (m2, n2), terms: a layer of 24 -> 36
FORMS = {"balanced": (((6, 4), (6, 6)), 1), "three-terms": (((9, 12), (4, 2)), 3), "tiny-a": (((2, 2), (18, 12)), 1)}
CONFIG = KronConfig(
    {"in": ShapeRule(b=(4, 2)), "out": ShapeRule(a=(2, 4), terms=2)}, patterns={"in": (r"\d\.0$",), "out": (r"\d\.2$",)}
)


def make_model() -> nn.Module:
    """Two feed-forward blocks of width 8 and a head."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.Sequential(*blocks), "head": nn.Linear(8, 3)})


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model["head"](model["blocks"](x))


def draw(model: nn.Module, std: float = 0.5) -> None:
    """Factors as after training: none is zero."""
    for module in model.modules():
        if isinstance(module, KronAdapter):
            for tensor in module.own_tensors().values():
                nn.init.normal_(tensor, std=std)


def run(function, x, layer, grad):
    """Output and the gradients of x and of the adapter's tensors."""
    x = x.clone().requires_grad_()
    y = function(x, layer)
    return (y, *torch.autograd.grad(y, (x, *layer.own_tensors().values()), grad))


def by_definition(x, layer):
    """The frozen layer and the built product, one after the other."""
    y = layer.base(x) + layer.scale * F.linear(x, reference.kron_weight(layer.a, layer.b))
    residual = getattr(layer, "residual_scale", None)
    return y if residual is None else y + residual * x


def assert_by_definition(layer: KronAdapter, dtype: torch.dtype, width: int, out: int) -> None:
    draw(layer)
    layer = layer.to(dtype).requires_grad_(True)
    x, grad = torch.randn(5, 7, width).to(dtype), torch.randn(5, 7, out).to(dtype)
    actual = run(lambda x, layer: layer(x), x, layer, grad)
    own = run(by_definition, x, layer, grad)
    oracle = run(by_definition, x.double(), copy.deepcopy(layer).double(), grad.double())
    for what, *tensors in zip(("y", "dx", *layer.own_tensors()), actual, own, oracle, strict=True):
        assert_accurate(*tensors, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_krona_is_the_layer_and_its_product(form, dtype):
    assert_by_definition(KronA(nn.Linear(24, 36), *FORMS[form], scale=1.7), dtype, 24, 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_a_block_and_its_product_and_a_share_of_its_input(residual, dtype):
    block = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
    assert_by_definition(KronABlock(block, ((4, 3), (3, 4)), 2, 0.6, residual), dtype, 12, 12)


def test_adapters_change_nothing_at_first_and_only_they_are_trained():
    model, x = make_model(), torch.randn(6, 8)
    wanted, dense = output(model, x), copy.deepcopy(model.state_dict())
    names = add_krona_(model, CONFIG, scale=3.0)
    assert names == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    assert torch.equal(output(model, x), wanted)
    layer = model.get_submodule("blocks.1.2")
    assert (tuple(layer.a.shape), tuple(layer.b.shape), layer.scale) == ((2, 2, 4), (2, 4, 4), 3.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{factor}" for name in names for factor in "ab"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B alone: A has no gradient where B is zero
        output(model, x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(output(model, x), wanted, atol=1e-3)
    remove_krona_(model, merge=False)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_and_unmerged_compute_the_same(dtype, tolerance):
    layer = KronA(nn.Linear(24, 36), *FORMS["three-terms"], scale=0.4).to(dtype).requires_grad_(False)
    draw(layer)
    x, weight = torch.randn(5, 24, dtype=dtype), layer.base.weight.clone()
    wanted = layer(x)
    layer.merge()
    layer.merge()
    built = weight.double() + 0.4 * reference.kron_weight(layer.a.double(), layer.b.double())
    assert_accurate(layer.base.weight, built.to(dtype), built)
    # In bfloat16 rounded once: the product itself is made in float32.
    assert dtype is torch.float32 or (layer.base.weight == built.to(dtype)).double().mean() > 0.9
    torch.testing.assert_close(layer(x), wanted, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.base.weight, weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer(x), wanted, rtol=tolerance, atol=tolerance)


def test_removed_adapters_are_merged_into_plain_layers():
    model, x = make_model(), torch.randn(6, 8)
    names = list(model.state_dict())
    add_krona_(model, CONFIG)
    draw(model)
    model.get_submodule("blocks.0.0").merge()
    wanted = output(model, x)
    remove_krona_(model)
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, KronAdapter) for module in model.modules())
    torch.testing.assert_close(output(model, x), wanted, rtol=1e-5, atol=1e-5)


def nested(model: nn.Module) -> nn.Module:
    """Adapters on linear layers, one of them inside a block that has its own."""
    add_krona_(model, CONFIG, scale=2.0)
    model["blocks"][1] = KronABlock(model["blocks"][1], ((2, 4), (4, 2)), scale=0.5, residual=True)
    freeze_but_krona_(model)
    draw(model)
    return model


def test_the_file_has_only_the_adapters_and_restores_them(tmp_path):
    model, x = nested(make_model()), torch.randn(6, 8)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "blocks.1.residual_scale" in trained
    save_krona(model, tmp_path / "adapters.safetensors")
    saved = load_file(tmp_path / "adapters.safetensors")
    assert set(saved) == trained
    loaded = make_model()
    load_krona_(loaded, tmp_path / "adapters.safetensors")
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    assert torch.equal(output(loaded, x), output(model, x))
    # Into adapters that are there already, the file goes as any state dict does.
    draw(loaded)
    assert not loaded.load_state_dict(saved, strict=False).unexpected_keys
    assert torch.equal(output(loaded, x), output(model, x))
    remove_krona_(loaded, merge=False)
    assert torch.equal(output(loaded, x), output(make_model(), x))


def test_autocast_computes_in_its_dtype():
    layer = KronA(nn.Linear(24, 36), *FORMS["balanced"])
    draw(layer)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.a.grad.dtype is torch.float32


SHAPES = ((6, 4), (6, 6))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: KronA(nn.Conv1d(2, 2, 1), SHAPES), TypeError, "base: expected an nn.Linear, got Conv1d"),
        (lambda: KronA(nn.Linear(24, 35), SHAPES), ValueError, r"shapes: expected a product of shape .* = \(35, 24\)"),
        (lambda: KronA(nn.Linear(24, 36), SHAPES, scale=float("nan")), ValueError, "scale: expected a finite number"),
        (lambda: KronABlock(nn.Linear(24, 36), SHAPES, residual=True), ValueError, "residual: expected False, or as m"),
        (lambda: save_krona(make_model(), "x"), ValueError, "model: expected KronA adapters, got none"),
        (lambda: remove_krona_(nested(make_model())), ValueError, "merge: expected False, got True for blocks.1: Kron"),
        (lambda: add_krona_(nested(make_model()), CONFIG), ValueError, "model: expected one without KronA adapters, "),
        (
            lambda: add_krona_(make_model(), replace(CONFIG, rules={"in": LowRankRule(2)})),
            ValueError,
            r"0\.0 \(in\): expected the shape of a factor, a or b, got rank 2",
        ),
    ],
)
def test_bad_input_is_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_errors_leave_the_model_as_it_was():
    model = make_model()
    config = KronConfig({"all": ShapeRule(b=(2, 2))}, patterns={"all": (r"\.0\.0$", "head")})
    with pytest.raises(ValueError, match=r"head \(all\): b: a factor of 2x2 does not divide a weight of 3x8"):
        add_krona_(model, config)
    assert list(model.state_dict()) == list(make_model().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    path, model = tmp_path / "file", make_model()
    save_krona(nested(make_model()), path)
    model["blocks"][1][2] = nn.Linear(16, 4)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"blocks.1.base.2: shapes: expected .* \(4, 16\), got"):
        load_krona_(model, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"path: expected a file of save_krona, format '1', got None in .*file"):
        load_krona_(model, path)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
