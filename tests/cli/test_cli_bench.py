"""`kron-kernels bench` and what the commands print."""

from __future__ import annotations

import io
import json
import re

import pytest

from kron_kernels.cli import bench, main
from kron_kernels.cli.output import Progress, format_table
from kron_kernels.testing import encoder

Capture = pytest.CaptureFixture[str]
QUICK = ["--case", "balanced", "--tokens", "1,3", "--seconds", "0.001", "--threads", "1"]


@pytest.mark.parametrize("more", [[], ["--backward"], ["--dtype", "bf16"]], ids=["forward", "backward", "bf16"])
def test_layers_json(more: list[str], capsys: Capture) -> None:
    assert main(["bench", "layers", *QUICK, *more, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    names = ("dense", "kron_kernels", "matmul B first", "matmul A first")
    expected = [(tokens, name) for tokens in (1, 3) for name in names]
    assert [(row["tokens"], row["variant"]) for row in report["rows"]] == expected
    assert all(row["us"] > 0 for row in report["rows"])
    assert [row["speed-up"] for row in report["rows"] if row["variant"] == "dense"] == [1.0, 1.0]
    assert "balanced, 1 tokens:   0%" in captured.err


def test_a_wrong_layer_gets_no_figure_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    real = bench.kron_op
    monkeypatch.setattr(bench, "kron_op", lambda op: lambda *operands: real(op)(*operands) * 1.01)
    assert main(["bench", "layers", *QUICK, "--json"]) == 1
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["variant"] == "kron_kernels"]
    assert all(row["status"].startswith("wrong: relative error 1.0e-02") for row in rows)
    assert all(row["us"] is None and row["speed-up"] is None for row in rows)


def test_model(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    real = encoder.encoders
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    monkeypatch.setattr(encoder, "encoders", lambda presets, dtype, **more: real(presets, dtype, **{**more, **sizes}))
    arguments = ["bench", "model", "--layers", "1", "--batch", "1", "--sequence", "8", "--seconds", "0.01"]
    assert main([*arguments, "--preset", "K8"]) == 0
    shown = capsys.readouterr().out
    names = [re.split(r"\s{2,}", line.strip())[3] for line in shown.splitlines()[-3:]]
    assert names == ["dense", "K8", "K8, inference form"]
    assert main([*arguments, "--preset", "K99"]) == 2
    assert "preset: expected one of" in capsys.readouterr().err


def test_threads_are_checked(capsys: Capture) -> None:
    assert main(["bench", "layers", *QUICK, "--threads", "0"]) == 2
    assert "--threads: expected at least 1, got 0" in capsys.readouterr().err


def test_table_aligns_numbers_to_the_right() -> None:
    table = format_table(("name", "count"), [("a", 5), ("bcd", 1234)])
    assert table.splitlines() == ["name  count", "----  -----", "a         5", "bcd    1234"]
    assert format_table(("name",), []).splitlines() == ["name", "----"]


def test_progress_skips_lines_that_come_too_quickly_but_not_the_last() -> None:
    stream = io.StringIO()
    progress = Progress(stream, every_seconds=100)
    for done in range(1, 11):
        progress(done, 10, f"step {done}")
    progress(1, 2, "other")
    progress(2, 2, "other")
    first, second = (line for line in stream.getvalue().splitlines() if line)
    assert first.startswith("step 10: 100%")
    assert second.startswith("other: 100%")
