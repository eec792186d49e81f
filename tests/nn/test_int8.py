"""int8 factors of one layer: what is stored, what it computes, its gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kron_kernels.nn import Int8KronDecoder, Int8KronEmbedding, Int8KronLinear, KronDecoder, KronEmbedding, KronLinear
from kron_kernels.nn.int8 import from_int8_, quantize_rows, to_int8_

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_rows_are_rounded_to_the_nearest_step(dtype: torch.dtype) -> None:
    factor = torch.randn(2, 7, 33).mul(torch.rand(2, 7, 1)).to(dtype)
    factor[1, 3] = 0
    values, scale = quantize_rows(factor)
    assert (values.dtype, values.shape) == (torch.int8, factor.shape)
    assert (scale.dtype, scale.shape) == (dtype, (2, 7))
    assert not values[1, 3].any()
    steps = scale.double().unsqueeze(-1)
    error = (factor.double() - values * steps).abs()
    # Half a step; the largest value may be clipped by as much as the scale was rounded.
    assert (error <= (0.5 + 127 * torch.finfo(dtype).eps) * steps).all()
    assert ((values.abs().amax(-1) == 127) | (scale == 0)).all()


@pytest.mark.parametrize(
    ("shapes", "stored"),
    [
        (((24, 24), (2, 2)), ("a_int8", "a_scale", "b")),
        (((8, 2), (24, 24)), ("a", "b_int8", "b_scale")),
        (((8, 8), (6, 6)), ("a_int8", "a_scale", "b_int8", "b_scale")),
    ],
)
def test_large_factors_are_int8_and_the_layer_computes_their_product(shapes: Any, stored: tuple[str, ...]) -> None:
    (m1, n1), (m2, n2) = shapes
    layer = KronLinear(n1 * n2, m1 * m2, shapes, terms=2, activation="gelu")
    wanted = copy.deepcopy(layer)
    to_int8_(layer)
    assert type(layer) is Int8KronLinear
    assert layer.factor_names() == stored
    assert set(layer.state_dict()) == {*stored, "bias"}
    assert (layer.shapes, layer.terms, layer.dtype) == (shapes, 2, torch.float32)
    assert copy.deepcopy(layer).to(torch.bfloat16).dtype is torch.bfloat16
    assert "int8=" + "+".join(name for name in "ab" if f"{name}_int8" in stored) in repr(layer)
    wanted.load_factors(layer.a, layer.b)
    x = torch.randn(3, 5, n1 * n2)
    torch.testing.assert_close(layer(x), wanted(x), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted(x), rtol=1e-5, atol=1e-5)
    a, b = layer.a, layer.b
    from_int8_(layer)
    assert type(layer) is KronLinear
    assert set(layer.state_dict()) == {"a", "b", "bias"}
    assert torch.equal(layer.a, a)
    assert torch.equal(layer.b, b)


def test_gradients_pass_through_frozen_factors() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2)))
    to_int8_(layer)
    x = torch.randn(4, 48)
    with torch.inference_mode():
        layer(x)  # a call in inference mode leaves nothing behind
    plain = KronLinear(48, 48, ((24, 24), (2, 2)))
    plain.load_factors(layer.a, layer.b)
    plain.bias.data.copy_(layer.bias)
    gradients = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        module(inputs).square().sum().backward()
        gradients.append((inputs.grad, module.b.grad, module.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert {name for name, _ in layer.named_parameters()} == {"b", "bias"}


@pytest.mark.slow
@pytest.mark.compile
def test_int8_layers_compile_and_export() -> None:
    layer = KronLinear(48, 48, ((24, 24), (2, 2))).eval()
    to_int8_(layer)
    x = torch.randn(3, 48)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
        torch.testing.assert_close(exported.module()(x), layer(x))
    assert exported.state_dict["a_int8"].dtype is torch.int8


@DTYPES
def test_embedding_gathers_int8_rows_and_shares_them_with_its_decoder(dtype: torch.dtype) -> None:
    layer = KronEmbedding(300, 48, 4, terms=2, padding_idx=3, dtype=dtype)
    to_int8_(layer)
    decoder = layer.tied_decoder(nn.Parameter(torch.randn(300, dtype=dtype)))
    assert (type(layer), type(decoder)) == (Int8KronEmbedding, Int8KronDecoder)
    ids, hidden = torch.randint(0, 300, (2, 7)), torch.ones(48, dtype=dtype)
    got = layer(ids), decoder(hidden)
    assert not layer(torch.tensor(3)).any()
    with pytest.raises(IndexError):
        layer(torch.tensor([300]))
    from_int8_(layer)
    from_int8_(decoder)
    assert (type(layer), type(decoder)) == (KronEmbedding, KronDecoder)
    assert decoder.a is layer.a
    torch.testing.assert_close(got, (layer(ids), decoder(hidden)))
