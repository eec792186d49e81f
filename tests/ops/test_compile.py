"""torch.compile and torch.export around the public functions: one graph for every batch size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from kron_kernels import AddNorm, kron_addmm, kron_addmm_, kron_ffn, kron_matmul, kron_qkv
from kron_kernels.ops import frozen_linear_kron
from kron_kernels.testing import shapes
from tests.ops.block_cases import FfnCase, make_ffn
from tests.ops.sampling import OPS
from tests.ops.test_embedding import embed, has_kernels
from tests.ops.test_embedding import leaves as embedding_leaves

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_fresh_dynamo")]
ODD = shapes.make(shapes.Case("odd", 24))
FFN = make_ffn(FfnCase("unchained", 24), torch.float32)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = (torch.nn.Parameter(tensor.clone()) for tensor in (ODD.a, ODD.b, ODD.bias))

    def forward(self, x: Tensor) -> Tensor:
        return kron_matmul(x, self.a, self.b, self.bias, activation="gelu")


def check(layer: torch.nn.Module, compiled: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> None:
    for batch in sizes:
        x = torch.randn(batch, 3, 10)
        results = []
        for module in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *layer.parameters()))))
        torch.testing.assert_close(*results)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


def test_a_layer() -> None:
    layer, counter = Layer(), CompileCounterWithBackend("aot_eager")
    check(layer, torch.compile(layer, fullgraph=True, dynamic=True, backend=counter), (4, 2, 7, 19))
    assert counter.frame_count == 2  # with gradients and without


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_layer_with_inductor() -> None:
    layer = Layer()
    check(layer, torch.compile(layer, fullgraph=True, dynamic=True), (4, 7))


def block(x: Tensor, residual: Tensor) -> Tensor:
    q, k = kron_qkv(x, [FFN.a1, -FFN.a1], [FFN.b1, FFN.b1], [FFN.bias1, FFN.bias1])
    y = kron_ffn(x, *FFN.layers[1:], norm=AddNorm(residual, FFN.weight, FFN.bias))
    return y + q.mean(-1, keepdim=True) * k.mean(-1, keepdim=True)


def added(x: Tensor, base: Tensor) -> Tensor:
    low_rank = (ODD.b[0][:, :1], ODD.b[0][:1])
    y = frozen_linear_kron(x, torch.ones(21, 10), None, ODD.a, ODD.b)
    return kron_addmm_(base * 2, x, ODD.a, ODD.b) + kron_addmm(y, x, ODD.a, low_rank)


@pytest.mark.parametrize(
    ("function", "inputs"), [(block, (FFN.x, FFN.residual)), (added, (ODD.x, ODD.grad))], ids=["block", "added"]
)
def test_functions_compile_once_for_every_batch_size(function: Callable[..., Tensor], inputs: tuple[Tensor]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    with torch.no_grad():
        for tokens in (23, 9, 13):
            some = [tensor[:tokens].clone() for tensor in inputs]
            torch.testing.assert_close(compiled(*some), function(*some))
            counts.append(counter.frame_count)
    assert counts == counts[:1] * 3
    x = inputs[0].clone().requires_grad_()
    ours, expected = (torch.autograd.grad(f(x, inputs[1]).sum(), x) for f in (compiled, function))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("with_kernels", [False, True])
def test_embedding(with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    has_kernels(monkeypatch, with_kernels)
    results = []
    for function in (torch.compile(embed, fullgraph=True, backend="aot_eager"), embed):
        tensors = embedding_leaves()
        y = function(*tensors.values())
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors.values())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("batched", [False, True])
def test_around_torch_func(batched: bool) -> None:
    function: Any = grad(lambda x, a: kron_matmul(x, a, ODD.b, ODD.bias, activation="gelu").square().sum(), (0, 1))
    function = vmap(function, (0, None)) if batched else function
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ODD.x, ODD.a), function(ODD.x, ODD.a))


def test_export_with_a_dynamic_batch() -> None:
    layer = Layer().eval()
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (torch.randn(4, 3, 10),), dynamic_shapes=dynamic)
    assert any(node.target is OPS.kron_matmul.default for node in program.graph.nodes)
    for size in (2, 9):
        x = torch.randn(size, 3, 10)
        torch.testing.assert_close(program.module()(x), layer(x))
