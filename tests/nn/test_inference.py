"""PackedKronLinear: the layer's results without its large factor, and nothing that could go stale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kron_kernels import backends
from kron_kernels.nn import KronLinear, PackedKronLinear
from kron_kernels.nn.inference import pack_

SHAPES = {
    "tiny_b": ((24, 18), (2, 3)),
    "tiny_a_expands": ((8, 2), (24, 16)),
    "middling": ((6, 8), (8, 6)),
}
compiled = pytest.mark.skipif(not backends.CPU_BY_DEFAULT, reason="the compiled kernels are not in use")


def make(shapes: Any = SHAPES["tiny_b"], terms: int = 1, **options: Any) -> KronLinear:
    (m1, n1), (m2, n2) = shapes
    return KronLinear(n1 * n2, m1 * m2, shapes, terms, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_results_are_those_of_the_layer(shapes: Any, dtype: torch.dtype) -> None:
    layer = make(shapes, terms=2, activation="gelu", dtype=dtype)
    x = [torch.randn(*lead, layer.in_features, dtype=dtype) for lead in ((), (1,), (2, 65), (0,))]
    with torch.no_grad():
        wanted = [layer(each) for each in x]
        pack_(layer)
        for each, want in zip(x, wanted, strict=True):
            torch.testing.assert_close(layer(each), want, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)
    assert type(layer) is PackedKronLinear
    assert (layer.shapes, layer.terms, layer.dtype) == (shapes, 2, dtype)


@compiled
def test_the_large_factor_is_kept_once() -> None:
    layer = make(((8, 2), (96, 96)))
    pack_(layer)
    assert list(layer.parameters()) == []
    assert {name for name, _ in layer.named_buffers()} == {"a", "bias", "packed"}
    assert layer.b.untyped_storage().nbytes() == 4
    assert layer.b.isnan().all()


def test_without_kernels_the_plain_factors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "compiled_by_default", lambda op: False)
    layer, x = make(), torch.randn(3, 54)
    wanted = layer(x).detach()
    pack_(layer)
    assert layer.packed is None
    torch.testing.assert_close(layer(x), wanted)
    with pytest.raises(RuntimeError, match="gradients of x: expected a model in training form"):
        layer(x.requires_grad_())


def test_gradients_moves_and_files_are_errors() -> None:
    layer = make()
    pack_(layer)
    x = torch.randn(2, 54, requires_grad=True)
    for use in (
        lambda: layer(x),
        lambda: torch.func.vmap(layer)(x),
        layer.double,
        layer.state_dict,
        layer.train,
        lambda: layer.load_state_dict({}),
        lambda: nn.Sequential(layer).to("meta"),
    ):
        with pytest.raises(RuntimeError, match="expected a model in training form"):
            use()
    with torch.no_grad():
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


@compiled
def test_bytes_of_another_layer_are_an_error() -> None:
    layer, other = make(), make(SHAPES["tiny_a_expands"])
    pack_(layer)
    pack_(other)
    layer.packed = other.packed
    with pytest.raises(ValueError, match="packed: expected what kron_pack made of factors"):
        layer(torch.randn(2, 54))
