"""``explain``: the choice of backend and the forms of the kernels, in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch

from kron_kernels import backends, explain
from kron_kernels.backends import select
from kron_kernels.cli import main

W1, W2 = (8, 2, 384, 384), (2, 8, 384, 384)


def test_cpu() -> None:
    explanation = explain(W1, device="cpu")
    expected = "cpu" if backends.available()["cpu"].available else "reference"
    assert explanation.backend == expected
    assert explanation.forms["cpu"] == "the right factor first, 301,056 multiply-adds a token and term (else 1,185,792)"
    assert str(explanation).startswith(f"kron_matmul of 8x2 (x) 384x384, 128 tokens in float32 on cpu: {expected} (")
    assert explain(W2, device="cpu").forms["cpu"].startswith("the left factor first, 301,056")
    named = explain(W1, device="cpu", backend="reference")
    assert (named.backend, named.reason) == ("reference", "requested by name")


def test_forms_of_the_triton_kernels() -> None:
    def form(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return explain(sizes, dtype=dtype, device="cpu", tokens=4096).forms["triton"]

    expanding = (
        "one product of 2 rows a token with the 384x384 factor, the 8x2 factor on the left applied while storing"
    )
    assert form(*W1).startswith(expanding)
    assert "the 2x16 factor on the right applied while loading" in form(384, 48, 2, 16)
    assert form(16, 64, 48, 48).startswith("two chained products, the left factor first")
    assert "neither factor is tiny" in form(300, 300, 40, 20)
    assert "not torch.float64" in form(*W1, dtype=torch.float64)


def test_forms_of_the_feed_forward_block() -> None:
    def form(*products: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> str:
        return explain(*products, op="kron_ffn", dtype=dtype, device="cpu", tokens=4096).forms["triton"]

    assert form(W1, W2).startswith("one kernel, the 3072 wide middle in registers; ")
    assert form(W1, W2, dtype=torch.float32).startswith("two kernels that hand over the narrow middle")
    apart = form((384, 384, 8, 2), (384, 384, 2, 8))
    assert apart.startswith("two products: ")
    assert "the 8x2 factor on the right applied while storing" in apart


def test_forms_of_the_embedding() -> None:
    def form(op: str, k: int) -> str:
        return explain((30522, 12, 1, k), op=op, dtype=torch.bfloat16, device="cpu").forms["triton"]

    # A wide row vector is no tiny factor of a product, and the embedding takes it.
    assert form("kron_embedding", 64).startswith("rows gathered, expanded and normed in one pass, ")
    assert form("kron_embedding_backward", 4096) == "a program cannot hold rows of 12 * 4096 values"


def test_the_choice_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    status = backends.Status("triton", True, "Triton 3")
    row = dataclasses.replace(backends.BACKENDS["triton"], status=lambda: status)
    monkeypatch.setitem(backends.BACKENDS, "triton", row)
    select._choose.cache_clear()
    try:
        explanation = explain(W1, W2, op="kron_ffn_backward", device="cuda", dtype=torch.float64)
        assert explanation.backend == "reference"
        assert explanation.reason.startswith("triton: ")
        assert explanation.forms["cuda"]
    finally:
        select._choose.cache_clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain(W1, op="kron"), "op: expected one of 'kron_matmul', .*, got 'kron'"),
        (lambda: explain(W1, op="kron_ffn"), "products: expected 2 for kron_ffn, got 1"),
        (lambda: explain(op="kron_qkv"), "products: expected one or more for kron_qkv, got 0"),
        (lambda: explain((2, 2, 3)), r"products: expected \(S, m1, n1, m2, n2\) or .*, all positive, got \(2, 2, 3\)"),
        (lambda: explain((2, 2, 3, 0)), r"products: expected .*, all positive, got \(2, 2, 3, 0\)"),
        (lambda: explain(W1, device="tpu"), "device: expected 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "8x2,384x384", "2x8,384x384", "--op", "kron_ffn", "--device", "cpu", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["call"] == "kron_ffn of 8x2 (x) 384x384, 2x8 (x) 384x384, 128 tokens in float32 on cpu"
    assert main(["explain", "24x24,32x32,4", "--device", "cpu"]) == 0
    assert "4 terms of 24x24 (x) 32x32" in capsys.readouterr().out
    assert main(["explain", "24x24", "--device", "cpu"]) == 2
    assert "products: expected sizes such as 384x384,2x2" in capsys.readouterr().err
