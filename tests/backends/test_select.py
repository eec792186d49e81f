"""The choice among GPU backends, without a GPU: statuses and measurements are made up, or the kernels interpreted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kron_kernels import backends, kron_addmm, kron_ffn, kron_matmul
from kron_kernels.backends import select, triton
from kron_kernels.schemas.product import Product

PAIR = (Product(1, 384, 384, 2, 2),)
LARGE = (Product(1, 300, 300, 40, 20),)
BF16 = torch.bfloat16


def change(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """Changes a backend's row of the table."""
    monkeypatch.setitem(backends.BACKENDS, name, dataclasses.replace(backends.BACKENDS[name], **fields))
    select._choose.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on a machine with a CUDA device and Triton, without CUDA C++ kernels."""
    change(monkeypatch, "triton", status=lambda: backends.Status("triton", True, "Triton 3"))
    change(monkeypatch, "cuda", status=lambda: backends.Status("cuda", False, "not built"))
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    yield monkeypatch
    select._choose.cache_clear()
    select._measured.cache_clear()


def test_triton_computes_what_it_has_kernels_for(device: pytest.MonkeyPatch) -> None:
    assert select.choose("kron_matmul", PAIR, BF16, 128, 90) == ("triton", "not measured; cuda: not built")
    backend, reason = select.choose("kron_matmul", PAIR, torch.float64, 128, 90)
    assert backend == "reference"
    assert "triton: the kernels compute float32, bfloat16 and float16, not torch.float64" in reason
    assert "neither factor is tiny" in select.choose("kron_matmul", LARGE, BF16, 128, 90).reason
    for op in ("kron_embedding", "kron_embedding_backward"):
        assert select.choose(op, (Product(1, 30522, 12, 1, 64),), BF16, 4096, 90).backend == "triton"
    long = (Product(1, 30522, 4096, 1, 8),)
    backend, reason = select.choose("kron_embedding", long, BF16, 4096, 90)
    assert (backend, reason) == ("reference", "triton: a program cannot hold rows of 4096 * 8 values; cuda: not built")


def test_backend_requested_by_name_is_not_exchanged(device: pytest.MonkeyPatch) -> None:
    assert select.choose("kron_matmul", PAIR, BF16, 128, 90, "triton") == ("triton", "requested by name")
    assert select.choose("kron_matmul", PAIR, BF16, 128, 90, "reference").backend == "reference"
    message = (
        r"backend 'triton', requested by name, does not take kron_matmul of 384x384 \(x\) 2x2 in float64: the kernels"
    )
    with pytest.raises(RuntimeError, match=message):
        select.choose("kron_matmul", PAIR, torch.float64, 128, 90, "triton")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: not built"):
        select.choose("kron_matmul", PAIR, BF16, 128, 90, "cuda")


def test_measurements_decide(device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change(device, "cuda", status=lambda: backends.Status("cuda", True, ""), unsupported_reason=lambda _: None)
    call = "kron_matmul of 384x384 (x) 2x2 in bfloat16 on 90"
    choices = {call: {"4096": {"backend": "cuda", "over": "triton", "ratio": 1.25}}}
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    device.setattr(select, "CHOICES", tmp_path / "choices.json")
    select._measured.cache_clear()
    measured = "measured: 1.25 times as fast as triton"
    assert select.choose("kron_matmul", PAIR, BF16, 1000, 90) == ("cuda", measured)
    assert select.choose("kron_matmul", PAIR, BF16, 129, 90) == ("cuda", measured)
    for tokens, arch in ((128, 90), (1000, 80), (4097, 90)):
        assert select.choose("kron_matmul", PAIR, BF16, tokens, arch) == ("triton", "not measured")


def test_kernels_are_asked_about_as_many_tokens_as_there_are(device: pytest.MonkeyPatch) -> None:
    """An automatic choice must not raise: kernels have a limit, and calls of an embedding have as many ids as that."""
    limit = 3 * 2**24

    def reason(call: Any) -> str | None:
        return "too many tokens" if call.tokens > limit else None

    for name in ("triton", "cuda"):
        change(device, name, status=lambda: backends.Status("", True, ""), unsupported_reason=reason)
    for tokens in (3, limit - 1, limit):
        assert select.choose("kron_matmul", PAIR, BF16, tokens, 90).backend == "triton"
    assert select.choose("kron_matmul", PAIR, BF16, limit + 1, 90).backend == "reference"
    a, b, ids = torch.empty(1, 30522, 12), torch.empty(1, 1, 64), torch.empty(7, 5, dtype=torch.int64)
    assert select._OPERANDS["kron_embedding"](ids, a, b, *[None] * 6, 0.0)[2] == 35
    assert select._OPERANDS["kron_embedding_backward"](torch.empty(7, 5, 768), ids, a, b)[2] == 35


class Watcher(TorchDispatchMode):
    """Notes the ops that run, and the backend requested by name at that time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str | None]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "kron_kernels":
            self.seen.append((op._opname, select.forced()))
        return op(*args, **(kwargs or {}))


def _twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (dx,) = torch.autograd.grad(kron_matmul(x, a, b).sin().sum(), x, create_graph=True)
    return dx


@pytest.mark.parametrize(
    ("call", "op"),
    [
        (kron_matmul, "kron_matmul_backward"),
        (lambda x, a, b: kron_addmm(torch.zeros(5, 8), x, a, b), "kron_matmul_backward"),
        (lambda x, a, b: kron_ffn(x, a, b, None, a.mT, b.mT, None), "kron_ffn_backward"),
        (_twice, "kron_matmul_backward"),
    ],
    ids=["kron_matmul", "kron_addmm", "kron_ffn", "second order"],
)
def test_name_requested_holds_for_backward(call: Callable[..., Tensor], op: str) -> None:
    if not backends.available()["cpu"].available:
        pytest.skip(backends.available()["cpu"].reason)
    x, a, b = torch.randn(5, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True), torch.randn(2, 3)
    gradients = []
    for name in (None, "triton"):
        with select.force(name):
            y = call(x, a, b)
        with Watcher() as watcher:
            gradients.append(torch.autograd.grad(y.square().sum(), (x, a)))
        assert (op, name) in watcher.seen
        assert {forced for _, forced in watcher.seen} == {name}
        assert select.forced() is None
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_interpreter_is_not_trusted_in_bfloat16(device: pytest.MonkeyPatch) -> None:
    device.setattr(triton, "interpreted", lambda: True)
    backend, reason = select.choose("kron_matmul", PAIR, BF16, 128, None)
    assert (backend, reason) == ("reference", "triton: Triton's interpreter is wrong in bfloat16; cuda: not built")
    assert select.choose("kron_matmul", PAIR, torch.float16, 128, None).backend == "triton"
