"""Transforms of torch.func around kron_matmul, and vmap of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from kron_kernels import kron_matmul
from kron_kernels.schemas import reference
from tests.ops.sampling import OPS
from tests.ops.test_matmul import leaves


def fused(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return kron_matmul(x, a, b, bias, activation="gelu")


def plain(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return reference.kron_matmul(x, a, b, bias, "gelu")


def both(transform: Callable[[Callable[..., Tensor]], Any]) -> None:
    torch.testing.assert_close(transform(fused), transform(plain))


ALL = (0, 1, 2, 3)


def test_torch_func() -> None:
    operands = tuple(tensor.detach() for tensor in leaves(tokens=4))
    x, *shared = operands
    both(lambda f: grad(lambda *t: f(*t).square().sum(), ALL)(*operands))
    per_sample = (0, None, None, None)
    both(lambda f: vmap(grad(lambda *t: f(*t).square().sum(), ALL), per_sample)(x.view(2, 2, -1), *shared))
    both(lambda f: jacrev(f, ALL)(*operands))
    both(lambda f: jacrev(grad(lambda *t: f(*t).square().sum(), 1), (0, 2))(*operands))
    y = vmap(vmap(lambda t: OPS.kron_matmul(t, *shared, 0)))(x.view(2, 2, 1, -1))
    torch.testing.assert_close(y, reference.kron_matmul(x.view(2, 2, 1, -1), *shared))


@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None),
        (2, None, None, None),
        (0, None, None, 0),
        (None, 0, None, None),
        (None, None, 1, 0),
        (1, 0, 0, 0),
    ],
)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    def batch(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.detach()
        return tensor if dim is None else torch.stack([tensor, 2 * tensor, tensor - 1], dim)

    batched = tuple(batch(t, dim) for t, dim in zip(leaves(tokens=4), in_dims, strict=True))
    both(lambda f: vmap(f, in_dims)(*batched))
    both(lambda f: grad(lambda *t: vmap(f, in_dims)(*t).square().sum(), ALL)(*batched))


def test_functional_call_over_an_ensemble() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(1, 3, 5)), torch.nn.Parameter(torch.randn(1, 7, 2))

        def forward(self, x: Tensor) -> Tensor:
            return kron_matmul(x, self.a, self.b)

    layer, x = Layer(), torch.randn(3, 10)
    ensemble = {name: torch.stack([p.detach(), -p.detach()]) for name, p in layer.named_parameters()}
    y = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(ensemble)
    torch.testing.assert_close(y, layer(x).expand(2, 3, 21))
