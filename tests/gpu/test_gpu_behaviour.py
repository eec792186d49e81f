"""On a GPU: compiled graphs, CUDA graphs, streams, equal results, errors, and more elements than 32 bits count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kron_kernels.backends.triton.problems import LAYERS
from torch import Tensor

from kron_kernels import kron_ffn, kron_matmul, kron_qkv
from kron_kernels.backends.triton import configs, tune
from tests.cases import Case, make
from tests.gpu.gpu_support import moved

pytestmark = pytest.mark.gpu

_FORMS = ["k8-attention", "k8-w1-small", "k8-w2-small", "k21-attention", "balanced"]


def operands(shape: str, device: str, tokens: int = 300, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x, a, b, bias."""
    o = make(Case(shape, tokens), dtype)
    return [moved(tensor, device) for tensor in (o.x, o.a, o.b, o.bias) if tensor is not None]


@pytest.mark.compile
@pytest.mark.parametrize("shape", ["k8-attention", "balanced"])
def test_compiled_without_breaks_or_recompilation(shape: str, gpu: str) -> None:
    x, a, b, bias = operands(shape, gpu)
    a.requires_grad_()

    def run(x: Tensor) -> Tensor:
        return kron_matmul(x, a, b, bias, activation="gelu").float().square().mean()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    compiled(x).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2, 64, 299):
            torch.testing.assert_close(compiled(x[:tokens]), run(x[:tokens]), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("shape", _FORMS)
def test_cuda_graph(shape: str, gpu: str, backend: str) -> None:
    """Forward and backward as one graph: replayed on new values it computes what a call on them does."""
    x, a, b, bias = operands(shape, gpu)
    leaves = [x, a, b, bias]
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> list[Tensor]:
        y = kron_matmul(x, a, b, bias, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    graph, captured = capture(run)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for found, want in zip(captured, run(), strict=True):
        assert torch.equal(found, want)


def test_cuda_graph_of_blocks(gpu: str) -> None:
    x, a, b, bias = operands("k8-attention-small", gpu)
    first, second = operands("k8-w1-small", gpu), operands("k8-w2-small", gpu)

    def run() -> list[Tensor]:
        with torch.inference_mode():
            qkv = kron_qkv(x, [a] * 3, [b] * 3, [bias] * 3)
            return [*qkv, kron_ffn(*first, *second[1:])]

    graph, captured = capture(run)
    x.copy_(torch.randn_like(x))
    first[0].copy_(torch.randn_like(first[0]))
    graph.replay()
    for found, want in zip(captured, run(), strict=True):
        assert torch.equal(found, want)


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@pytest.mark.parametrize("shape", _FORMS)
def test_results_are_equal_each_time(shape: str, gpu: str, backend: str) -> None:
    x, a, b, bias = operands(shape, gpu, 3000)
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_(), bias.requires_grad_()]

    def run() -> tuple[Tensor, ...]:
        y = kron_matmul(x, a, b, bias, backend=backend)
        return (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))

    first = run()
    for _ in range(20):
        for one, again in zip(first, run(), strict=True):
            assert torch.equal(one, again)


def test_calls_run_on_the_current_stream(gpu: str, backend: str) -> None:
    x, a, b, bias = operands("k8-attention", gpu)
    want = kron_matmul(x, a, b, bias, backend=backend)
    source = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # A kernel on another stream would start before this ends, and read zeros.
        torch.cuda._sleep(20_000_000)
        source.copy_(x)
        found = kron_matmul(source, a, b, bias, backend=backend)
    stream.synchronize()
    assert torch.equal(found, want)


def test_errors(gpu: str, backend: str) -> None:
    x, a, b, bias = operands("balanced", gpu)
    with pytest.raises(ValueError, match=r"a: expected .*cuda.*, got .*cpu"):
        kron_matmul(x, a.cpu(), b, bias, backend=backend)
    with pytest.raises(ValueError, match=r"bias: expected .*cuda.*, got .*cpu"):
        kron_matmul(x, a, b, bias.cpu(), backend=backend)
    doubles = [tensor.double() for tensor in (x, a, b, bias)]
    with pytest.raises(RuntimeError, match=f"backend '{backend}', requested by name, does not take .* in float64"):
        kron_matmul(*doubles, backend=backend)
    torch.testing.assert_close(kron_matmul(*doubles).cpu(), kron_matmul(*(tensor.cpu() for tensor in doubles)))


@pytest.mark.parametrize("shape", ["k8-attention", "k8-w1-small", "k8-w2-small", "balanced"])
def test_more_elements_than_32_bits_count(shape: str, gpu: str, backend: str) -> None:
    _, a, b, bias = operands(shape, gpu, 1)
    n, m = a.shape[-1] * b.shape[-1], a.shape[-2] * b.shape[-2]
    tokens = 2**31 // max(n, m) + 100
    if torch.cuda.mem_get_info()[0] < 2.4 * tokens * (n + 3 * m):
        pytest.skip(f"{tokens} tokens take more memory than is free")
    x = torch.empty(tokens, n, dtype=torch.bfloat16, device=gpu).normal_()
    y = kron_matmul(x, a, b, bias, backend=backend)
    rows = torch.cat([torch.arange(50), torch.arange(tokens - 50, tokens), torch.arange(tokens - 120, tokens - 80)])
    rows = rows.to(gpu)
    torch.testing.assert_close(y[rows], kron_matmul(x[rows], a, b, bias, backend=backend), rtol=2e-2, atol=2e-2)
    grad_a = torch.autograd.grad(kron_matmul(x, a.requires_grad_(), b, None, backend=backend), a, torch.ones_like(y))[0]
    # Of equal gradients of all tokens: that of the one token which is the sum of them.
    total = x.sum(0, dtype=torch.float64)[None]
    twin = a.detach().double().requires_grad_()
    want = torch.autograd.grad(kron_matmul(total, twin, b.double(), None), twin, torch.ones(1, m, device=gpu).double())[
        0
    ]
    assert (grad_a.double() - want).norm() <= 2e-2 * want.norm()


@pytest.mark.usefixtures("gpu")
def test_tuning_one_shape(tmp_path: Path) -> None:
    """The tuner finds tiles that are right and writes them; what it measured is no slower than the default."""
    try:
        assert tune.main(["--shape", "64x64,2x2", "--tokens", "512", "--out", str(tmp_path)]) == 0
    finally:
        LAYERS.pop("64x64,2x2", None)
    (path,) = tmp_path.glob("*.json")
    entries = configs.read(path)
    assert entries
    for entry in entries.values():
        assert entry.us is not None
        assert entry.default_us is None or entry.us <= 1.2 * entry.default_us
