"""``explain``: the choice of backend and the forms of the kernels, in words."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from kron_kernels import backends, explain
from kron_kernels.cli import main

W1, W2 = (8, 2, 384, 384), (2, 8, 384, 384)
BF16 = torch.bfloat16


def test_cpu() -> None:
    explanation = explain(W1, device="cpu")
    expected = "cpu" if backends.available()["cpu"].available else "reference"
    assert explanation.backend == expected
    assert explanation.forms["cpu"] == "the right factor first, 301,056 multiply-adds a token and term (else 1,185,792)"
    assert str(explanation).startswith(f"kron_matmul of 8x2 (x) 384x384, 128 tokens in float32 on cpu: {expected} (")
    named = explain(W1, device="cpu", backend="reference")
    assert (named.backend, named.reason) == ("reference", "requested by name")


@pytest.mark.parametrize(
    ("op", "products", "dtype", "start"),
    [
        ("kron_matmul", [W1], BF16, "one product of 2 rows a token with the 384x384 factor, the 8x2 factor on"),
        ("kron_matmul", [(300, 300, 40, 20)], BF16, "of 300x300 (x) 40x20 neither factor is tiny"),
        ("kron_matmul", [W1], torch.float64, "the kernels compute float32, bfloat16 and float16, not torch.float64"),
        ("kron_ffn", [W1, W2], BF16, "one kernel, the 3072 wide middle in registers; "),
        ("kron_embedding", [(30522, 12, 1, 64)], BF16, "rows gathered, expanded and normed in one pass, "),
        ("kron_embedding_backward", [(30522, 12, 1, 4096)], BF16, "a program cannot hold rows of 12 * 4096 values"),
    ],
)
def test_forms_of_the_triton_kernels(
    op: str, products: list[tuple[int, ...]], dtype: torch.dtype, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.triton, "interpreted", lambda: False)
    form = explain(*products, op=op, dtype=dtype, device="cpu", tokens=4096).forms["triton"]
    assert form.startswith(start)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explain(W1, op="kron"), "op: expected one of 'kron_matmul', .*, got 'kron'"),
        (lambda: explain(W1, op="kron_ffn"), "products: expected 2 for kron_ffn, got 1"),
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
    assert main(["explain", "24x24", "--device", "cpu"]) == 2
    assert "products: expected sizes such as 384x384,2x2" in capsys.readouterr().err
