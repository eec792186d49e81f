"""On a GPU: compiled graphs, CUDA graphs, streams, equal results, errors, and more elements than 32 bits count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kron_kernels import kron_ffn, kron_matmul, kron_qkv
from kron_kernels.testing.shapes import Case, make

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

FORMS = ["k8-attention", "k8-w1-small", "k8-w2-small", "k21-attention", "balanced"]


def operands(shape: str, tokens: int = 300) -> list[Tensor]:
    """x, a, b, bias."""
    o = make(Case(shape, tokens), torch.bfloat16)
    return [tensor.cuda() for tensor in (o.x, o.a, o.b, o.bias) if tensor is not None]


def gradients_of(leaves: list[Tensor], backend: str) -> Callable[[], list[Tensor]]:
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> list[Tensor]:
        y = kron_matmul(*leaves, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    return run


@pytest.mark.compile
@pytest.mark.parametrize("shape", ["k8-attention", "balanced"])
def test_compiled_without_breaks_or_recompilation(shape: str) -> None:
    x, a, b, bias = operands(shape)
    a.requires_grad_()

    def run(x: Tensor) -> Tensor:
        return kron_matmul(x, a, b, bias, activation="gelu").float().square().mean()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    compiled(x).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2, 64, 299):
            torch.testing.assert_close(compiled(x[:tokens]), run(x[:tokens]), rtol=2e-2, atol=1e-3)


def replayed(run: Callable[[], list[Tensor]], *inputs: Tensor) -> None:
    """A graph of the calls, replayed on new values, computes what calls on them do."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for found, want in zip(captured, run(), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("shape", FORMS)
def test_cuda_graph(shape: str, backend: str) -> None:
    leaves = operands(shape)
    replayed(gradients_of(leaves, backend), leaves[0])


def test_cuda_graph_of_blocks() -> None:
    x, a, b, bias = operands("k8-attention-small")
    first, second = operands("k8-w1-small"), operands("k8-w2-small")

    def run() -> list[Tensor]:
        with torch.inference_mode():
            return [*kron_qkv(x, [a] * 3, [b] * 3, [bias] * 3), kron_ffn(*first, *second[1:])]

    replayed(run, x, first[0])


@pytest.mark.parametrize("shape", FORMS)
@pytest.mark.parametrize("tokens", [3000, 8455])
def test_results_are_equal_each_time(shape: str, tokens: int, backend: str) -> None:
    run = gradients_of(operands(shape, tokens), backend)
    first = run()
    for _ in range(20):
        assert all(torch.equal(one, again) for one, again in zip(first, run(), strict=True))


def test_calls_run_on_the_current_stream(backend: str) -> None:
    x, a, b, bias = operands("k8-attention")
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


def test_errors(backend: str) -> None:
    x, a, b, bias = operands("balanced")
    with pytest.raises(ValueError, match=r"a: expected .*cuda.*, got .*cpu"):
        kron_matmul(x, a.cpu(), b, bias, backend=backend)
    doubles = [tensor.double() for tensor in (x, a, b, bias)]
    with pytest.raises(RuntimeError, match=f"backend '{backend}', requested by name, does not take .* in float64"):
        kron_matmul(*doubles, backend=backend)
    torch.testing.assert_close(kron_matmul(*doubles).cpu(), kron_matmul(*(tensor.cpu() for tensor in doubles)))


@pytest.mark.parametrize("shape", ["k8-attention", "k8-w1-small", "k8-w2-small"])
def test_more_elements_than_32_bits_count(shape: str, backend: str) -> None:
    _, a, b, bias = operands(shape, 1)
    n, m = a.shape[-1] * b.shape[-1], a.shape[-2] * b.shape[-2]
    tokens = 2**31 // max(n, m) + 100
    if torch.cuda.mem_get_info()[0] < 2.4 * tokens * (n + 3 * m):
        pytest.skip(f"{tokens} tokens take more memory than is free")
    x = torch.empty(tokens, n, dtype=torch.bfloat16, device="cuda").normal_()
    y = kron_matmul(x, a, b, bias, backend=backend)
    rows = torch.cat([torch.arange(50), torch.arange(tokens - 120, tokens)]).cuda()
    torch.testing.assert_close(y[rows], kron_matmul(x[rows], a, b, bias, backend=backend), rtol=2e-2, atol=2e-2)
    grad_a = torch.autograd.grad(kron_matmul(x, a.requires_grad_(), b, None, backend=backend), a, torch.ones_like(y))[0]
    # Of equal gradients of all tokens: that of the one token which is the sum of them.
    total, twin = x.sum(0, dtype=torch.float64)[None], a.detach().double().requires_grad_()
    ones = torch.ones(1, m, device="cuda", dtype=torch.float64)
    (want,) = torch.autograd.grad(kron_matmul(total, twin, b.double(), None), twin, ones)
    assert (grad_a.double() - want).norm() <= 2e-2 * want.norm()
