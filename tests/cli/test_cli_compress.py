"""``kron-kernels compress``: tables, JSON, progress, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kron_kernels.cli import main
from kron_kernels.compress.target import REPORT_NAME
from kron_kernels.convert.presets import KronConfig, preset

Capture = pytest.CaptureFixture[str]


def test_command_prints_a_table_and_progress(bert: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["compress", str(bert), str(tmp_path / "out"), "--preset", "k8", "--calibrate", str(text)]
    assert main([*arguments, "--warm-start-steps", "4", "--weight-dtype", "int8"]) == 0
    captured = capsys.readouterr()
    for line in ("attention       8  16x16 (x) 2x2", "data-aware fit on 27 lines, 189 tokens", "int8 factors: "):
        assert line in captured.out
    assert captured.out.splitlines()[-1].startswith("agreement with the dense model ")
    assert "warm start: encoder.layer.1: 100%" in captured.err
    saved = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert [block["name"] for block in saved["blocks"]["blocks"]] == [
        "embeddings",
        "encoder.layer.0",
        "encoder.layer.1",
    ]


def test_command_takes_a_config_and_prints_json(bert: Path, tmp_path: Path, capsys: Capture) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(preset("K8").to_json())
    arguments = ["compress", str(bert), str(out), "--config", str(config), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "KronBertModel"
    assert report["verdict"].startswith("agreement with the dense model ")
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(f"out: {out} exists; pass --force (overwrite=True) to replace it\n")
    assert main([*arguments, "--force"]) == 0
    inside = out / "config-of-mine.json"
    inside.write_text(preset("K8").to_json())
    assert main(["compress", str(bert), str(out), "--config", str(inside), "--force"]) == 2
    assert inside.exists()


def test_command_writes_a_plan_that_it_takes_back(bert: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    arguments = ["compress", str(bert), str(plan), "--size", "1.5x", "--calibrate", str(text), "--plan-only"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    config = KronConfig.from_json(plan.read_text())
    assert printed[:2] == [f"attention  {config.rules['attention']}", f"ffn_in     {config.rules['ffn_in']}"]
    assert "similarities of sentences correlate" in printed[-1]
    assert main(arguments) == 2
    assert "plan.json exists; pass --force" in capsys.readouterr().err
    options = ["--config", str(plan), "--calibrate", str(text), "--warm-start", "data-aware", "--json"]
    assert main(["compress", str(bert), str(out), *options]) == 0
    conversion = json.loads(capsys.readouterr().out)["conversion"]
    assert conversion["config"] == config.to_dict()
    assert f"{conversion['params_after']:,} parameters" in printed[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "8x"], "calibrate_text: expected text to plan on, got none"),
        (["--size", "8x", "--plan-only"], "--plan-only: expected text to plan on (--calibrate), got none"),
        (["--preset", "K9"], "preset: expected one of K8, K19, K21, KnGPT2, TQCompressor, TQCompressor-QKV, got 'K9'"),
        (["--preset", "K8", "--calibrate", "absent.txt"], "absent.txt"),
        (["--config", "absent.json"], "absent.json"),
        (["--preset", "K8", "--terms", "0"], "terms: expected an integer of at least 1, got 0"),
        (["--preset", "K8", "--weight-dtype", "int3"], "weight_dtype: expected 'int8' or 'int4', got 'int3'"),
        (["--preset", "K8", "--warm-start", "blockwise"], "warm_start: expected text to calibrate on for 'blockwise'"),
        (["--preset", "K8", "--warm-start", "best"], "warm_start: expected one of plain, data-aware, blockwise, got"),
    ],
)
def test_bad_input_is_one_clear_line(
    options: list[str],
    message: str,
    bert: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    assert main(["compress", str(bert), str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("kron-kernels compress: error: ")
    assert message in last
    assert not (tmp_path / "out").exists()
