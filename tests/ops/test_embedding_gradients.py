"""The gradient op of the embedding, and the function that autograd sees where a device has kernels for it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from kron_kernels import backends, kron_embedding
from kron_kernels.schemas import embedding

NAMES = embedding.EMBEDDING_GRADIENTS
IDS = torch.tensor([[2, 0, 2], [1, 2, 4]])
POSITIONS, TYPES = torch.tensor([0, 2, 1]), torch.tensor([[0], [1]], dtype=torch.int32)


@pytest.fixture(params=["function", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a device with kernels for the gradient, and as on others."""
    has_kernels(monkeypatch, request.param == "function")
    return request.param


def has_kernels(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[tuple[str, str]]:
    """Lets the CPU have kernels for the gradient, or not; returns the list of what is asked."""
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(backends, "has_kernel", lambda *question: asked.append(question) or answer)
    monkeypatch.setattr(backends, "resolve", lambda backend, _: backend or "cpu")
    return asked


def leaves(terms: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows of 3 * 2 values."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((terms, 5, 3), (terms, 1, 2), (4, 6), (2, 6), (6,), (6,))
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def embed(*tensors: Tensor, names: tuple[str, ...] = NAMES) -> Tensor:
    given: dict[str, Any] = dict(zip(names, tensors, strict=True))
    if "position_weight" in given:
        given["position_ids"] = POSITIONS
    if "type_weight" in given:
        given["type_ids"] = TYPES
    return kron_embedding(IDS, **given, eps=1e-3)


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:3], (*NAMES[:2], *NAMES[3:])], ids=len)
def test_gradients_are_those_of_finite_differences(way: str, names: tuple[str, ...]) -> None:
    tensors = [leaves()[name] for name in names]
    function = functools.partial(embed, names=names)
    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("wanted", [*NAMES, NAMES[::2]])
def test_gradients_of_some(way: str, wanted: str | tuple[str, ...]) -> None:
    every = leaves()
    expected = dict(zip(NAMES, torch.autograd.grad(embed(*every.values()).square().sum(), every.values()), strict=True))
    tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in every.items()}
    embed(*tensors.values()).square().sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, expected[name])
        else:
            assert tensor.grad is None


def test_only_the_inputs_are_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    has_kernels(monkeypatch, True)
    tensors, kept = leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        embed(*tensors.values())
    inputs = {tensor.data_ptr() for tensor in (IDS, POSITIONS, TYPES, *tensors.values())}
    assert {tensor.data_ptr() for tensor in kept} <= inputs


def test_the_function_is_for_devices_with_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = has_kernels(monkeypatch, True)
    y = embed(*leaves().values())
    assert type(y.grad_fn).__name__ == "KronEmbeddingBackward"
    assert asked == [("kron_embedding_backward", "cpu")]
    o = leaves()
    y = kron_embedding(IDS, o["a"], o["b"], backend="reference")
    assert type(y.grad_fn).__name__ != "KronEmbeddingBackward"
    monkeypatch.undo()
    assert not backends.has_kernel("kron_embedding_backward", "meta")
    assert not backends.has_kernel("kron_embedding_backward", "cpu")


def test_torch_func(way: str) -> None:
    tensors = leaves()
    expected = torch.autograd.grad(embed(*tensors.values()).sum(), tensors.values())
    actual = torch.func.grad(lambda *t: embed(*t).sum(), argnums=tuple(range(6)))(
        *(t.detach() for t in leaves().values())
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.compile
def test_compiles_whole(way: str) -> None:
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, embed):
        tensors = leaves()
        y = function(*tensors.values())
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors.values())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tables", [True, False])
def test_opcheck(tables: bool) -> None:
    o = {name: tensor.detach() for name, tensor in leaves(dtype=torch.float32).items()}
    rest: list[Any] = [POSITIONS, o["position_weight"], TYPES, o["type_weight"], o["norm_weight"]]
    rest = rest if tables else [None] * 5
    grad = torch.randn(2, 3, 6)
    for needs in (0b111111, 0b010010) if tables else (0b11, 0b10, 0):
        torch.library.opcheck(embedding.kron_embedding_backward, (grad, IDS, o["a"], o["b"], *rest, 1e-3, needs))


def test_no_tokens_give_zero_gradients() -> None:
    o = {name: tensor.detach() for name, tensor in leaves().items()}
    none = IDS[:0]
    gradients = embedding.kron_embedding_backward(
        torch.zeros(0, 3, 6, dtype=torch.float64), none, o["a"], o["b"], POSITIONS, o["position_weight"], none,
        o["type_weight"], o["norm_weight"], 1e-3, 0b111111,
    )  # fmt: skip
    for gradient, tensor in zip(gradients, o.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))
