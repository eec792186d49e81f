"""A frozen linear layer with a Kronecker product beside it: results, gradients of any order, memory, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kron_kernels import backends
from kron_kernels.ops import frozen_linear, frozen_linear_kron
from kron_kernels.ops.frozen_linear import is_plain_frozen
from kron_kernels.schemas import reference
from kron_kernels.testing import accuracy

HAS_CPU = backends.available()["cpu"]
ALPHA = 0.7
RIGHT = ("full", "low rank", "rank that does not pay")


class Layer:
    """Operands of ``((8, 6), (10, 12))`` with 3 x 7 tokens, and the same through the built weight."""

    def __init__(self, right: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        rank = {"full": 0, "low rank": 2, "rank that does not pay": 11}[right]
        self.x, self.weight, self.bias = normal(3, 7, 72), normal(80, 72) / 9, normal(80) if bias else None
        self.a, self.grad = normal(8, 6) / 3, normal(3, 7, 80)
        self.right = (normal(10, rank) / 3, normal(rank, 12) / 3) if rank else (normal(10, 12) / 3,)

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, self.a, *self.right]

    def ours(self, x: Tensor, a: Tensor, *right: Tensor) -> Tensor:
        b = right[0] if len(right) == 1 else (right[0], right[1])
        return frozen_linear_kron(x, self.weight, self.bias, a, b, alpha=ALPHA)

    def plain(self, x: Tensor, a: Tensor, *right: Tensor) -> Tensor:
        b = right[0] if len(right) == 1 else right[0] @ right[1]
        return F.linear(x, self.weight, self.bias) + ALPHA * reference.kron_matmul(x, a[None], b[None])


def gradients(layer: Layer, function: Any) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in layer.trained]
    return torch.autograd.grad(function(*leaves), leaves, layer.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("right", RIGHT)
def test_result_and_gradients(right: str, dtype: torch.dtype) -> None:
    layer, exact = Layer(right, dtype), Layer(right, torch.float64)
    for name in ("x", "weight", "bias", "a", "grad"):
        setattr(exact, name, getattr(layer, name).double())
    exact.right = tuple(factor.double() for factor in layer.right)
    with torch.no_grad():
        y = layer.ours(*layer.trained)
        assert y.is_contiguous()
        accuracy.assert_accurate(y, layer.plain(*layer.trained), exact.plain(*exact.trained))
    found, same_dtype, oracle = (
        gradients(layer, layer.ours),
        gradients(layer, layer.plain),
        gradients(exact, exact.plain),
    )
    for name, *three in zip(("x", "a", "b or p", "q"), found, same_dtype, oracle, strict=False):
        accuracy.assert_accurate(*three, f"gradient of {name}")


@pytest.mark.parametrize("right", RIGHT)
def test_gradients_of_gradients(right: str) -> None:
    layer = Layer(right, torch.float64)
    layer.x = layer.x[:1, :2]
    leaves = [tensor.clone().requires_grad_() for tensor in layer.trained]
    assert torch.autograd.gradcheck(layer.ours, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer.ours, leaves, fast_mode=True)


@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(needed: int) -> None:
    layer = Layer("low rank")
    inputs = [tensor.clone().requires_grad_(index == needed) for index, tensor in enumerate(layer.trained)]
    (alone,) = torch.autograd.grad(layer.ours(*inputs), inputs[needed], layer.grad)
    torch.testing.assert_close(alone, gradients(layer, layer.plain)[needed], rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Counts new tensors of at least so many values."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                self.seen.add(tensor.untyped_storage().data_ptr())
        return out


@pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)
@pytest.mark.parametrize("right", ["full", "low rank"])
def test_one_result_and_one_gradient(right: str) -> None:
    """Of x's size nothing is made but the result and the gradient of x."""
    layer = Layer(right)
    leaves = [tensor.clone().requires_grad_() for tensor in layer.trained]
    with Largest(layer.x.numel()) as forward:
        y = layer.ours(*leaves)
    given = {tensor.untyped_storage().data_ptr() for tensor in (leaves[0], layer.weight, layer.grad)}
    assert forward.seen - given == {y.untyped_storage().data_ptr()}
    with Largest(layer.x.numel()) as backward:
        dx, *_ = torch.autograd.grad(y, leaves, layer.grad)
    assert backward.seen - given == {dx.untyped_storage().data_ptr()}


def test_results_may_be_changed_in_place() -> None:
    layer = Layer("full")
    x = layer.x.clone().requires_grad_()
    y = layer.ours(x, layer.a, *layer.right)
    y.relu_()
    expected = layer.plain(x, layer.a, *layer.right).relu()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), x)[0] for each in (y, expected)), rtol=1e-4, atol=1e-4)


def test_compilers_transforms_and_autocast_take_the_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("low rank")
    expected = layer.plain(*layer.trained)
    monkeypatch.setattr(frozen_linear, "FrozenLinearKron", None)
    compiled = torch.compile(layer.ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*layer.trained), expected)
    torch.testing.assert_close(torch.vmap(lambda x: layer.ours(x, *layer.trained[1:]))(layer.x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.ours(*layer.trained)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    layer = Layer("low rank", bias=False)
    layer.x, layer.grad = layer.x[:tokens, :1], layer.grad[:tokens, :1]
    for found, expected in zip(gradients(layer, layer.ours), gradients(layer, layer.plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plain_frozen_layers() -> None:
    def frozen_layer(change: Any = lambda layer: None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
        layer = kind(4, 3).requires_grad_(False)
        change(layer)
        return layer

    class Other(nn.Linear):
        pass

    assert is_plain_frozen(frozen_layer())
    assert is_plain_frozen(nn.Linear(4, 3, bias=False).requires_grad_(False))
    assert not is_plain_frozen(nn.Conv1d(4, 3, 1).requires_grad_(False))
    assert not is_plain_frozen(frozen_layer(kind=Other))
    changes: list[Any] = [
        lambda layer: layer.bias.requires_grad_(),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "forward", lambda x: x),
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    ]
    for change in changes:
        assert not is_plain_frozen(frozen_layer(change))
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert not is_plain_frozen(frozen_layer())
    handle.remove()
    assert is_plain_frozen(frozen_layer())
