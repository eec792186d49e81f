"""The example of PEFT's LoKr on a tiny random model."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is not installed")


def test_both_ways_train_alike(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    example = importlib.import_module("peft_lokr")
    monkeypatch.setattr("sys.argv", ["peft_lokr", "--hidden", "32", "--steps", "3"])
    losses = example.main()
    assert losses["kron_kernels"] == pytest.approx(losses["PEFT"], rel=1e-4)
    assert losses["PEFT"][-1] < losses["PEFT"][0], "it learns"
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["PEFT", "kron_kernels"]
