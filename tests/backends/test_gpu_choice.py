"""The choice among GPU backends, without a GPU: statuses and measurements are made up, or the kernels interpreted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kron_kernels
from kron_kernels import backends, kron_addmm, kron_ffn, kron_matmul
from kron_kernels.backends import select, triton
from kron_kernels.ops import blocks, matmul
from kron_kernels.schemas.product import Product

PAIR = (Product(1, 384, 384, 2, 2),)
LARGE = (Product(1, 300, 300, 40, 20),)
triton_installed = pytest.importorskip("triton", reason="Triton is not installed")


def with_statuses(monkeypatch: pytest.MonkeyPatch, **reasons: str) -> None:
    """Makes backends available (a reason of "") or not."""
    for name, reason in reasons.items():
        status = backends.Status(name, not reason, reason)
        row = dataclasses.replace(backends.BACKENDS[name], status=lambda status=status: status)
        monkeypatch.setitem(backends.BACKENDS, name, row)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on a machine with a CUDA device and Triton, without CUDA C++ kernels."""
    with_statuses(monkeypatch, triton="", cuda="not built")
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    select._choose.cache_clear()
    yield monkeypatch
    select._choose.cache_clear()
    select._measured.cache_clear()


def test_triton_computes_what_it_has_kernels_for(device: pytest.MonkeyPatch) -> None:
    assert select.choose("kron_matmul", PAIR, torch.bfloat16, 128, 90) == ("triton", "not measured; cuda: not built")
    backend, reason = select.choose("kron_matmul", PAIR, torch.float64, 128, 90)
    assert backend == "reference"
    assert "triton: the kernels compute float32, bfloat16 and float16, not torch.float64" in reason
    backend, reason = select.choose("kron_matmul", LARGE, torch.bfloat16, 128, 90)
    assert backend == "reference"
    assert "neither factor is tiny" in reason


def test_embeddings_have_conditions_of_their_own(device: pytest.MonkeyPatch) -> None:
    table = (Product(1, 30522, 12, 1, 64),)
    for op in ("kron_embedding", "kron_embedding_backward"):
        assert select.choose(op, table, torch.bfloat16, 4096, 90).backend == "triton"
    long = (Product(1, 30522, 4096, 1, 8),)
    backend, reason = select.choose("kron_embedding", long, torch.bfloat16, 4096, 90)
    assert (backend, reason) == ("reference", "triton: a program cannot hold rows of 4096 * 8 values; cuda: not built")


def test_backend_asked_for_by_name_is_not_exchanged(device: pytest.MonkeyPatch) -> None:
    assert select.choose("kron_matmul", PAIR, torch.bfloat16, 128, 90, "triton") == ("triton", "requested by name")
    assert select.choose("kron_matmul", PAIR, torch.bfloat16, 128, 90, "reference").backend == "reference"
    message = (
        r"backend 'triton', requested by name, does not take kron_matmul of 384x384 \(x\) 2x2 in float64: the kernels"
    )
    with pytest.raises(RuntimeError, match=message):
        select.choose("kron_matmul", PAIR, torch.float64, 128, 90, "triton")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: not built"):
        select.choose("kron_matmul", PAIR, torch.bfloat16, 128, 90, "cuda")


def test_what_was_measured_decides(device: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_statuses(device, cuda="")
    row = dataclasses.replace(backends.BACKENDS["cuda"], unsupported_reason=lambda _: None)
    device.setitem(backends.BACKENDS, "cuda", row)
    call = "kron_matmul of 384x384 (x) 2x2 in bfloat16 on 90"
    choices = {call: {"4096": {"backend": "cuda", "over": "triton", "ratio": 1.25}}}
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    device.setattr(select, "CHOICES", tmp_path / "choices.json")
    select._measured.cache_clear()
    measured = "measured: 1.25 times as fast as triton"
    assert select.choose("kron_matmul", PAIR, torch.bfloat16, 1000, 90) == ("cuda", measured)
    assert select.choose("kron_matmul", PAIR, torch.bfloat16, 100, 90) == ("triton", "not measured")
    assert select.choose("kron_matmul", PAIR, torch.bfloat16, 1000, 80) == ("triton", "not measured")


def test_autocast_does_not_reach_the_implementations(device: pytest.MonkeyPatch) -> None:
    seen = []

    def implementation(*_: object) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))

    for name in ("triton", "reference"):
        row = dataclasses.replace(backends.BACKENDS[name], implementations=lambda: {"kron_matmul": implementation})
        device.setitem(backends.BACKENDS, name, row)
    with torch.autocast("cpu", torch.bfloat16):
        select._dispatched("kron_matmul")(torch.ones(3, 4), torch.ones(2, 2), torch.ones(2, 2), None, 0)
    assert seen == [False]


def _ffn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return kron_ffn(x, a, b, None, a.mT, b.mT, None)


def _twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (dx,) = torch.autograd.grad(kron_matmul(x, a, b).sin().sum(), x, create_graph=True)
    return dx


@pytest.mark.parametrize(
    ("call", "module", "op"),
    [
        (kron_matmul, matmul, "kron_matmul_backward"),
        (lambda x, a, b: kron_addmm(torch.zeros(5, 8), x, a, b), matmul, "kron_matmul_backward"),
        (_ffn, blocks, "kron_ffn_backward"),
        (_twice, matmul, "kron_matmul_backward"),
    ],
    ids=["kron_matmul", "kron_addmm", "kron_ffn", "second order"],
)
@pytest.mark.parametrize("name", [None, "triton"])
def test_name_asked_for_holds_for_backward(
    call: Callable[..., Tensor], module: ModuleType, op: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not backends.available()["cpu"].available:
        pytest.skip(backends.available()["cpu"].reason)
    x, a, b = torch.randn(5, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True), torch.randn(2, 3)
    with select.force(name):
        y = call(x, a, b)
    seen = []
    original = getattr(module, op)

    def backward(*args: object) -> object:
        seen.append(select.forced())
        return original(*args)

    monkeypatch.setattr(module, op, backward)
    y.sum().backward()
    assert set(seen) == {name}
    assert select.forced() is None


def test_interpreter_is_not_trusted_in_bfloat16(device: pytest.MonkeyPatch) -> None:
    device.setattr(triton, "interpreted", lambda: True)
    backend, reason = select.choose("kron_matmul", PAIR, torch.bfloat16, 128, None)
    assert (backend, reason) == ("reference", "triton: Triton's interpreter is wrong in bfloat16; cuda: not built")
    assert select.choose("kron_matmul", PAIR, torch.float16, 128, None).backend == "triton"


def test_reason_of_a_missing_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    status = backends.available()["triton"]
    assert not status.available
    x, a, b = torch.randn(3, 4), torch.randn(2, 2), torch.randn(2, 2)
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: TRITON_INTERPRET is set"):
        kron_matmul(x, a, b, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
        kron_matmul(x, a, b, backend="cuda")


_INTERPRETED = """
import torch
from kron_kernels import backends, kron_matmul
from kron_kernels.backends import select
from kron_kernels.schemas import reference
from kron_kernels.backends.triton import mm
assert backends.available()["triton"].available
calls = []
original = mm.launch
mm.launch = lambda kernel, *rest: (calls.append(kernel.fn.__name__), original(kernel, *rest))
torch.manual_seed(0)
x, a, b = torch.randn(9, 96), torch.randn(1, 24, 48) / 7, torch.randn(1, 2, 2)
for tensor in (x, a, b):
    tensor.requires_grad_()
for options in ({}, {"backend": "triton"}):
    y = kron_matmul(x, a, b, activation="gelu", **options)
    expected = reference.kron_matmul(x, a, b, None, "gelu")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y.sin().sum(), (x, a, b))
    for one, other in zip(found, torch.autograd.grad(expected.sin().sum(), (x, a, b))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert calls.count("mm_kernel") == 2 and calls.count("large_gradient_kernel") == 1, calls
    calls.clear()
try:
    kron_matmul(x.detach().double(), a.detach().double(), b.detach().double())
except RuntimeError as error:
    print(error)
"""


def test_the_whole_library_under_the_interpreter() -> None:
    variables = {
        **os.environ,
        "PYTHONPATH": str(Path(kron_kernels.__file__).parent.parent),
        "TRITON_INTERPRET": "1",
        "KRON_KERNELS_BACKEND": "triton",
    }
    result = subprocess.run([sys.executable, "-c", _INTERPRETED], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("backend 'triton', requested by name, does not take kron_matmul of 24x48 (x) 2x2")
