"""The command ``kron-kernels explain``."""

from __future__ import annotations

import json

import pytest
import torch

from kron_kernels.cli import main

Capture = pytest.CaptureFixture[str]


def test_says_nothing_of_gpus_on_a_machine_without(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["explain", "384x384,2x2"]) == 0
    shown = capsys.readouterr().out
    assert "128 tokens in float32 on cpu" in shown
    assert "triton" not in shown
    assert "cuda" not in shown
    assert main(["explain", "384x384,2x2", "--device", "cuda", "--json"]) == 0
    assert {"triton", "cuda"} <= json.loads(capsys.readouterr().out)["forms"].keys()


def test_wrong_sizes_are_one_line(capsys: Capture) -> None:
    assert main(["explain", "384x384"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kron-kernels explain: error: products: expected sizes such as 384x384,2x2")
    assert error.count("\n") == 1
