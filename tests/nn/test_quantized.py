"""Tensors of a layer stored as int8 and int4: what is stored, what it computes, its gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from kron_kernels.nn import AdaptiveEmbedding, KronEmbedding, KronLinear, LowRankLinear, TiedDecoder, is_quantized
from kron_kernels.nn.quantized import GROUP, dequantize, from_quantized_, quantize, to_quantized_
from tests.nn.test_embedding import LargestTensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WEIGHT_DTYPES = pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
IDS = torch.tensor([[0, 299, 3], [3, 7, 120]])


@DTYPES
@WEIGHT_DTYPES
@pytest.mark.parametrize("width", [1, 32, 71])
def test_values_are_rounded_to_the_nearest_step_of_their_group(
    dtype: torch.dtype, weight_dtype: str, width: int
) -> None:
    tensor = torch.randn(2, 7, width).mul(torch.rand(2, 7, 1)).to(dtype)
    tensor[1, 3] = 0
    values, scale = quantize(tensor, weight_dtype)
    stored = width if weight_dtype == "int8" else (width + 1) // 2
    assert (values.element_size(), values.shape) == (1, (2, 7, stored))
    groups = -(-width // GROUP)
    assert (scale.dtype, scale.shape) == (dtype, (2, 7, groups))
    assert not scale[1, 3].any()
    got = dequantize(values, scale, width)
    assert (got.dtype, got.shape) == (dtype, tensor.shape)
    lowest = 128 if weight_dtype == "int8" else 8
    steps = scale.double().abs().repeat_interleave(GROUP, -1)[..., :width]
    error = (got.double() - tensor.double()).abs()
    # Half a step, and rounding; a value close to the opposite of the largest is cut off by up to a step.
    assert (error <= (1 + lowest * torch.finfo(dtype).eps) * steps).all()
    assert (error > 0.5 * steps + lowest * torch.finfo(dtype).eps * steps).double().mean() < 0.02
    for group in range(groups):
        inside = slice(group * GROUP, (group + 1) * GROUP)
        largest = tensor[..., inside].abs().amax(-1)
        torch.testing.assert_close(got[..., inside].abs().amax(-1), largest, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if dtype is torch.float32:
        assert all(torch.equal(*pair) for pair in zip(quantize(got, weight_dtype), (values, scale), strict=True))


LAYERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "large a": (lambda: KronLinear(48, 48, ((24, 24), (2, 2)), 2, activation="gelu"), ("a",)),
    "large b": (lambda: KronLinear(48, 192, ((8, 2), (24, 24)), 2, bias=False), ("b",)),
    "both": (lambda: KronLinear(48, 48, ((8, 8), (6, 6))), ("a", "b")),
    "low rank": (lambda: LowRankLinear(48, 70, 5), ("u", "v")),
    "low rank of odd sizes": (lambda: LowRankLinear(47, 33, 5, bias=False), ("u", "v")),
}


@WEIGHT_DTYPES
@pytest.mark.parametrize(("make", "stored"), LAYERS.values(), ids=LAYERS)
def test_a_layer_computes_the_product_of_what_is_stored(make: Any, stored: tuple[str, ...], weight_dtype: str) -> None:
    layer = make()
    plain, before, dense = copy.deepcopy(layer), set(layer.state_dict()), layer.dense_weight().detach()
    to_quantized_(layer, weight_dtype)
    names = {f"{name}_{suffix}" for name in stored for suffix in (weight_dtype, "scale")}
    assert set(layer.state_dict()) == before - set(stored) | names
    assert is_quantized(layer)
    assert f"{weight_dtype}={'+'.join(stored)}" in repr(layer)
    assert layer.dtype is torch.float32
    assert copy.deepcopy(layer).to(torch.bfloat16).dtype is torch.bfloat16
    assert layer.numel() == sum(getattr(plain, name).numel() for name in stored)
    if isinstance(layer, KronLinear):
        assert (layer.shapes, layer.terms) == (plain.shapes, plain.terms)
    for name in stored:
        getattr(plain, name).data.copy_(getattr(layer, name))
    error = float((plain.dense_weight().detach() - dense).norm() / dense.norm())
    assert 1e-4 < error < {"int8": 0.015, "int4": 0.2}[weight_dtype]
    x = torch.randn(3, 5, layer.in_features)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), plain(x))
    from_quantized_(layer)
    assert type(layer) is type(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in layer.state_dict().items())


@WEIGHT_DTYPES
@pytest.mark.parametrize("name", ["large a", "low rank"])
def test_gradients_pass_through_what_is_stored(name: str, weight_dtype: str) -> None:
    layer = LAYERS[name][0]()
    to_quantized_(layer, weight_dtype)
    x = torch.randn(4, 48)
    with torch.inference_mode():
        layer(x)  # a call in inference mode leaves nothing behind
    plain = copy.deepcopy(layer)
    from_quantized_(plain)
    gradients = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        module(inputs).square().sum().backward()
        gradients.append((inputs.grad, module.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert {name for name, _ in layer.named_parameters()} == {"b", "bias"} - ({"b"} if name == "low rank" else set())


EMBEDDINGS: dict[str, Any] = {
    "kron": lambda **options: KronEmbedding(300, 48, 4, terms=2, padding_idx=3, **options),
    "adaptive": lambda **options: AdaptiveEmbedding(300, 48, ((20, 24), (280, 7)), padding_idx=3, **options),
}


@DTYPES
@WEIGHT_DTYPES
@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_an_embedding_looks_up_stored_rows_and_decodes_with_them(
    make: Any, weight_dtype: str, dtype: torch.dtype
) -> None:
    model = nn.ModuleDict({"words": make(dtype=dtype)})
    layer: Any = model["words"]
    to_quantized_(layer, weight_dtype)
    model["head"] = layer.tied_decoder(nn.Parameter(torch.randn(300, dtype=dtype)))
    assert type(model["head"]) is TiedDecoder
    assert [name for name in model.state_dict() if name.startswith("head")] == ["head.bias"]
    assert layer.dtype is dtype
    hidden = torch.ones(48, dtype=dtype)
    got = layer(IDS), model["head"](hidden)
    assert not layer(torch.tensor(3)).any()
    with pytest.raises(IndexError, match=r"ids: expected indices in \[0, 300\), got 300"):
        layer(torch.tensor([300]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close((other["words"](IDS), other["head"](hidden)), got, rtol=0, atol=0)
    from_quantized_(layer)
    assert type(layer) in (KronEmbedding, AdaptiveEmbedding)
    torch.testing.assert_close((layer(IDS), model["head"](hidden)), got)


@WEIGHT_DTYPES
@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_a_look_up_converts_the_rows_it_needs(make: Any, weight_dtype: str) -> None:
    layer = make()
    to_quantized_(layer, weight_dtype)
    with torch.no_grad(), LargestTensor() as seen:
        layer(IDS)
    assert seen.numel <= (24 + 7 + 2) * 48  # projections and means; a table has 280 x 7 numbers, A 300 x 12


@WEIGHT_DTYPES
def test_tables_are_stored_and_projections_are_int8(weight_dtype: str) -> None:
    layer = AdaptiveEmbedding(300, 48, ((20, 24), (280, 7)))
    to_quantized_(layer, weight_dtype)
    stored = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    bits = {"int8": (24, 7), "int4": (12, 4)}[weight_dtype]
    assert stored == {
        "means": (2, 48),
        "places": (300,),
        f"tables.0_{weight_dtype}": (20, bits[0]),
        f"tables.1_{weight_dtype}": (280, bits[1]),
        "tables.0_scale": (20, 1),
        "tables.1_scale": (280, 1),
        "projections.0_int8": (24, 48),
        "projections.1_int8": (7, 48),
        "projections.0_scale": (24, 2),
        "projections.1_scale": (7, 2),
    }
    assert layer.tables.numel() == 20 * 24 + 280 * 7
    assert f"{weight_dtype} 20x24, {weight_dtype} 280x7" in repr(layer)


@WEIGHT_DTYPES
def test_drawing_anew_keeps_the_storage(weight_dtype: str) -> None:
    for make in (*(make for make, _ in LAYERS.values()), *EMBEDDINGS.values()):
        layer = make()
        to_quantized_(layer, weight_dtype)
        names, kind = list(layer.state_dict()), type(layer)
        layer.reset_parameters(0.25)
        assert (set(layer.state_dict()), type(layer)) == (set(names), kind)
        torch.testing.assert_close(layer.dense_weight().std(), torch.tensor(0.25), rtol=0.3, atol=0)
        if isinstance(layer, KronEmbedding | AdaptiveEmbedding):
            assert not layer(torch.tensor(3)).any()


@pytest.mark.slow
@pytest.mark.compile
@WEIGHT_DTYPES
def test_stored_layers_compile_and_export(weight_dtype: str) -> None:
    layers = KronLinear(48, 48, ((24, 24), (2, 2))), LowRankLinear(48, 9, 3)
    layer = nn.Sequential(AdaptiveEmbedding(300, 48, ((20, 24), (280, 7))), *layers).eval()
    for each in layer:
        to_quantized_(each, weight_dtype)
    with torch.no_grad():
        exported = torch.export.export(layer, (IDS,))
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(IDS), layer(IDS))
        torch.testing.assert_close(exported.module()(IDS), layer(IDS))
    assert exported.state_dict[f"1.a_{weight_dtype}"].element_size() == 1
