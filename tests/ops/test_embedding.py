"""kron_embedding and its gradients: accuracy, and the function that autograd sees where a device has kernels."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from kron_kernels import backends, kron_embedding
from kron_kernels.schemas.embedding import EMBEDDING_GRADIENTS as NAMES
from kron_kernels.testing import accuracy, shapes
from tests.ops import block_cases
from tests.ops.sampling import LOWER, OPS, TOP, needs_extension, short

IDS = torch.tensor([[2, 0, 2], [1, 2, 4]])
POSITIONS, TYPES = torch.tensor([0, 2, 1]), torch.tensor([[0], [1]], dtype=torch.int32)


@pytest.fixture(params=["function", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
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
    sizes = ((terms, 5, 3), (terms, 1, 2), (4, 6), (2, 6), (6,), (6,))
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, size in zip(NAMES, sizes, strict=True)
    }


@needs_extension
@pytest.mark.parametrize("isa", [TOP, *LOWER[:1]], indirect=True)
@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=short)
def test_accuracy(dtype: torch.dtype, isa: str) -> None:
    for case in block_cases.EMBEDDINGS:
        o, same_dtype, oracle = block_cases.embedding_case(*case, dtype)
        ids, a, *rest = o.operands
        y = OPS.kron_embedding(ids, a, *rest)
        accuracy.assert_accurate(y, same_dtype, oracle, str(case))
        columns = OPS.kron_embedding(ids.T.contiguous().T, a.mT.contiguous().mT, *rest)
        assert torch.equal(columns, y)


def embed(*tensors: Tensor, names: tuple[str, ...] = NAMES) -> Tensor:
    given: dict[str, Any] = dict(zip(names, tensors, strict=True))
    if "position_weight" in given:
        given["position_ids"] = POSITIONS
    if "type_weight" in given:
        given["type_ids"] = TYPES
    return kron_embedding(IDS, **given, eps=1e-3)


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:3], (*NAMES[:2], *NAMES[3:])], ids=len)
def test_gradients_are_those_of_finite_differences(path: str, names: tuple[str, ...]) -> None:
    tensors = [leaves()[name] for name in names]
    function = functools.partial(embed, names=names)
    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", [*NAMES, NAMES[::2]])
def test_gradients_of_some(path: str, wanted: str | tuple[str, ...]) -> None:
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


def test_torch_func(path: str) -> None:
    tensors = leaves()
    expected = torch.autograd.grad(embed(*tensors.values()).sum(), tensors.values())
    actual = torch.func.grad(lambda *t: embed(*t).sum(), argnums=tuple(range(6)))(
        *(t.detach() for t in leaves().values())
    )
    torch.testing.assert_close(actual, expected)


def test_no_tokens_give_zero_gradients() -> None:
    o = {name: tensor.detach() for name, tensor in leaves().items()}
    none = IDS[:0]
    gradients = OPS.kron_embedding_backward(
        torch.zeros(0, 3, 6, dtype=torch.float64), none, o["a"], o["b"], POSITIONS, o["position_weight"], none,
        o["type_weight"], o["norm_weight"], 1e-3, 0b111111,
    )  # fmt: skip
    for gradient, tensor in zip(gradients, o.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))
