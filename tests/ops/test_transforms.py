"""torch.func, torch.compile and torch.export around kron_matmul."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, vmap

from kron_kernels import kron_matmul
from kron_kernels.schemas import matmul, reference
from kron_kernels.testing import shapes


def operands(tokens: int = 4, terms: int = 2) -> tuple[Tensor, ...]:
    o = shapes.make(shapes.Case("odd", tokens, terms), torch.float64)
    return o.x, o.a, o.b, o.bias


def fused(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return kron_matmul(x, a, b, bias, activation="gelu")


def plain(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return reference.kron_matmul(x, a, b, bias, "gelu")


ALL = (0, 1, 2, 3)


def test_func_grad() -> None:
    for argnums in ALL:
        ours = grad(lambda *t: fused(*t).square().sum(), argnums)(*operands())
        torch.testing.assert_close(ours, grad(lambda *t: plain(*t).square().sum(), argnums)(*operands()))


def test_per_sample_gradients() -> None:
    """vmap(grad): every sample its own gradient of the shared factors."""
    x, *shared = operands(6)
    results = [
        vmap(grad(lambda *t, f=f: f(*t).square().sum(), ALL), (0, None, None, None))(x.view(3, 2, -1), *shared)
        for f in (fused, plain)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None), (2, None, None, None), (None, 0, None, None), (None, None, 1, 0), (1, 0, 0, 0)]
)
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    def batch(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else torch.stack([tensor, 2 * tensor, tensor - 1], dim)

    batched = tuple(batch(t, dim) for t, dim in zip(operands(), in_dims, strict=True))
    torch.testing.assert_close(vmap(fused, in_dims)(*batched), vmap(plain, in_dims)(*batched))

    def loss(f: object, *tensors: Tensor) -> Tensor:
        return vmap(f, in_dims)(*tensors).square().sum()

    for argnums in ALL:
        ours = grad(lambda *t: loss(fused, *t), argnums)(*batched)
        torch.testing.assert_close(ours, grad(lambda *t: loss(plain, *t), argnums)(*batched))


def test_nested_vmap_of_the_ops() -> None:
    x, a, b, bias = operands(6)
    x = x.view(2, 3, 1, -1)
    y = vmap(vmap(lambda t: matmul.kron_matmul(t, a, b, bias, 0)))(x)
    torch.testing.assert_close(y, reference.kron_matmul(x, a, b, bias))


def test_jacobian_and_second_derivatives() -> None:
    for argnums in ALL:
        torch.testing.assert_close(jacrev(fused, argnums)(*operands()), jacrev(plain, argnums)(*operands()))
    second = [jacrev(grad(lambda *t, f=f: f(*t).square().sum(), 1), (0, 2))(*operands(2, 1)) for f in (fused, plain)]
    torch.testing.assert_close(*second)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, *parameters = operands()
        self.a, self.b, self.bias = (torch.nn.Parameter(tensor.float()) for tensor in parameters)

    def forward(self, x: Tensor) -> Tensor:
        return kron_matmul(x, self.a, self.b, self.bias, activation="gelu")


def test_functional_call_over_an_ensemble() -> None:
    layer, x = Layer(), torch.randn(3, 10)
    ensemble = {name: torch.stack([p.detach(), -p.detach()]) for name, p in layer.named_parameters()}
    y = vmap(lambda parameters: functional_call(layer, parameters, (x,)))(ensemble)
    torch.testing.assert_close(y[0], layer(x))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(layer: torch.nn.Module, compiled: torch.nn.Module, sizes: tuple[int, ...]) -> None:
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


@pytest.mark.compile
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_is_one_graph_for_every_batch_size() -> None:
    layer = Layer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    check_compiled(layer, compiled, (4, 2, 7, 19))
    assert counter.frame_count == 2  # with gradients and without


@pytest.mark.compile
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("batched", [False, True])
def test_compile_around_torch_func(batched: bool) -> None:
    x, a, b, bias = operands()
    function = grad(lambda x, a: fused(x, a, b, bias).square().sum(), (0, 1))
    if batched:
        function = vmap(function, (0, None))
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x, a), function(x, a))


@pytest.mark.compile
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor() -> None:
    layer = Layer()
    check_compiled(layer, torch.compile(layer, fullgraph=True, dynamic=True), (4, 7))


@pytest.mark.compile
def test_export_with_a_dynamic_batch() -> None:
    layer = Layer().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(4, 3, 10),), dynamic_shapes=({0: batch},))
    assert any(node.target is matmul.kron_matmul for node in program.graph.nodes)
    for size in (2, 9):
        x = torch.randn(size, 3, 10)
        torch.testing.assert_close(program.module()(x), layer(x))
