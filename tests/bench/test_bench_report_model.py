"""The report's sections on encoders, processes and profiles: reach, losses, and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import model, process_memory, profile
from bench.encoder_candidates import DISTIL, INT8_TORCH, ORT
from bench.harness import ResultFile
from bench.plots import plot_all, plot_ffn
from bench.plots_model import best_line, plot_latency, plot_profile
from bench.points import COLUMNS, POINT_KEY, Point, complete
from bench.report import render
from bench.targets import Verdict, encoder_reach, process_reach

MACHINE = {
    "commit": "abc",
    "date": "2026-01-01",
    "cpu": "Some CPU",
    "isa": "amx",
    "cores": 2,
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.13.0",
}


def encoder_row(name: str, speedup: float, **changes: Any) -> dict[str, Any]:
    row = {"dtype": "fp32", "batch": 1, "sequence": 128, "layers": 12, "model": name, "status": "ok", "error": 1e-6}
    figures = {"speedup_q10": 0.9 * speedup, "speedup_q50": speedup, "speedup_q90": 1.1 * speedup}
    over = {f"over_compiled_{q}": figures[f"speedup_{q}"] * 0.9 for q in ("q10", "q50", "q90")}
    return {**row, **figures, **over, "parameters": 10**7, "time_ms_q50": 100 / speedup, **MACHINE, **changes}


def process_row(name: str, peak: float, imported: float = 300.0, **changes: Any) -> dict[str, Any]:
    row = {"dtype": "fp32", "batch": 1, "sequence": 128, "layers": 12, "model": name, "status": "ok"}
    figures = {"peak_mib": peak, "imported_mib": imported, "model_mib": peak - imported, "checkpoint_mib": 50.0}
    return {**row, **figures, **MACHINE, **changes}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    ResultFile(tmp_path / "model.csv", model.KEY, model.COLUMNS).add(
        [
            encoder_row("dense", 1.0),
            encoder_row("dense, compiled", 1.1),
            encoder_row("K8", 2.9),
            encoder_row("K8, compiled", 3.0),
            encoder_row("K21", 4.0),
            encoder_row(DISTIL, 3.2),
            encoder_row(INT8_TORCH, 2.0, error=0.04),
            encoder_row("dense", 1.0, sequence=16),
            encoder_row("K8", 2.1, sequence=16),
            {**encoder_row(ORT, 1.0, dtype="bf16"), "status": "skipped", "reason": "float32 only", "speedup_q50": None},
        ]
    )
    ResultFile(tmp_path / "process.csv", process_memory.KEY, process_memory.COLUMNS).add(
        [process_row("dense", 800.0), process_row("K8", 400.0), process_row("K21", 280.0, 260.0)]
    )
    parts = {"FFN": 30.0, "attention": 10.0}
    ResultFile(tmp_path / "profile.csv", profile.KEY, profile.COLUMNS).add(
        {**encoder_row(name, 1.0), "part": part, "time_ms": time, "sum_ms": 40.0, "untraced_ms": 39.0, "gap": 0.0256}
        for name in ("dense", "K8")
        for part, time in parts.items()
    )
    return tmp_path


def text_row(**columns: Any) -> dict[str, str]:
    row = {"dtype": "fp32", "batch": 1, "sequence": 128, "layers": 12, "model": "K8", "isa": "amx", **columns}
    return {name: str(value) for name, value in row.items()}


def test_encoder_reach_follows_input_dtype_and_processor() -> None:
    assert encoder_reach(text_row()) == 2.8
    assert encoder_reach(text_row(model="K21", batch=8)) == 5
    assert encoder_reach(text_row(model="K21, compiled"), over_compiled=True) == 4.5
    assert encoder_reach(text_row(sequence=16)) == 2
    assert encoder_reach(text_row(sequence=16), over_compiled=True) is None
    assert encoder_reach(text_row(dtype="bf16")) == 1.8
    assert encoder_reach(text_row(dtype="bf16", isa="avx512")) is None
    assert encoder_reach(text_row(layers=2)) is None
    assert encoder_reach(text_row(batch=4)) is None
    assert process_reach(text_row()) == process_reach(text_row(model="K8, package")) == 0.45
    assert process_reach(text_row(sequence=16)) is None


def test_verdict_may_want_less() -> None:
    assert [str(Verdict(value, 0.45, at_most=True)) for value in (0.45, 0.46)] == ["0.45 ✓", "0.46 ✗"]
    assert Verdict(float("nan"), 1.0).missed
    assert not Verdict(0.1, None).missed


def test_encoder_tables_show_reach_and_losses(results: Path) -> None:
    text = render(results)
    # Over compiled dense the better of eager and compiled counts: 0.9 x 3.0.
    assert "| fp32, 1 x 128 | 100.0 | 2.90 ✓ | 2.70 ✓ | 4.00 ✗ | 3.60 ✗ |" in text
    assert "| fp32, 1 x 16 | 100.0 | 2.10 ✓ | 1.89 | - | - |" in text
    assert "| fp32, 1 x 128 | 1.10 | 2.90 | 3.00 | **4.00** | 3.20 | 2.00 | - |" in text
    assert f"| {DISTIL} | K8 | fp32, 1 x 128 |" in text
    assert f"| {DISTIL} | K21 |" not in text
    assert "| 2.00 (1.80 to 2.20) | 1.80 (1.62 to 1.98) | 4.0e-02 |" in text
    assert f"| {ORT} | skipped | float32 only | bf16 | 1 |" in text


def test_what_falls_short_covers_encoders_and_processes(results: Path) -> None:
    text = render(results)
    assert "**What falls short** (3 of 7 figures with a reach)" in text
    assert "| K21 encoder | fp32, 1 x 128 tokens | 4.00 (3.60 to 4.40) | ≥ 5 |  |" in text
    assert "| K21 encoder | fp32, 1 x 128 tokens | 3.60 (3.24 to 3.96) | ≥ 4.5 | over compiled dense |" in text
    note = "0.20 without the imports, 300 MiB of 400"
    assert f"| K8, memory of the process | fp32, 1 x 128 tokens | 0.50 | ≤ 0.45 | {note} |" in text


def test_process_table_shows_both_ratios(results: Path) -> None:
    text = render(results)
    assert "| fp32, 1 x 128 | K8 | 400 | 300 | 100 | 50 | 0.50 ✗ | 0.20 |" in text
    assert "| fp32, 1 x 128 | K21 | 280 | 260 | 20 | 50 | 0.35 ✓ | 0.04 |" in text


def test_profile_table_shows_the_gap(results: Path) -> None:
    assert "| fp32, 1 x 128 | K8 | 30.00 | 10.00 | 39.00 | +3% |" in render(results)


def test_old_rows_without_the_new_columns_are_shown(tmp_path: Path) -> None:
    columns = tuple(name for name in model.COLUMNS if not name.startswith("over_compiled") and name != "reason")
    ResultFile(tmp_path / "model.csv", model.KEY, columns).add([encoder_row("dense", 1.0), encoder_row("K8", 2.9)])
    text = render(tmp_path)
    assert "| fp32, 1 x 128 | 100.0 | 2.90 ✓ | - |" in text
    assert "Every way at every input" not in text


def test_ffn_blocks_have_a_section_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {"status": "ok", "over_peak": 1.0, "peak_flop": 10**9, "peak_gflops": 200.0, "time_us_q50": 10.0}
    file = ResultFile(tmp_path / "ffn.csv", (*POINT_KEY, "variant"), COLUMNS)
    for variant, speedup in (("kron_kernels", 9.5), ("matmul", 4.0), ("dense, compiled", 1.2)):
        speedups = {f"speedup_{q}": speedup for q in ("q10", "q50", "q90")}
        for dtype in ("fp32", "bf16"):
            point = Point("k21-ffn", dtype, False, 1, 128)
            file.add([{**complete(point, {"variant": variant, **figures, **speedups}), **MACHINE}])
    text = render(tmp_path)
    assert "**FFN block (W1, GELU, W2), fp32, forward**" in text
    assert "| k21-ffn | 16x2 ⊗ 192x384 -> 2x16 ⊗ 384x192 | 15.4 | 9.50 ✓ |" in text
    assert "| k21-ffn | 128 | 9.50 (9.50 to 9.50) | 4.00 (matmul) | 1.20 |" in text
    plot_ffn(tmp_path)
    assert (tmp_path / "ffn.png").read_bytes().startswith(b"\x89PNG")


def test_plots_are_written(results: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_profile(results)
    plot_latency(results)
    for name in ("profile", "latency"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(results.glob(".*.png"))
    assert "![Time of an encoder by part](profile.png)" in render(results)


def test_nothing_is_plotted_from_nothing(tmp_path: Path) -> None:
    plot_all(tmp_path)
    assert not list(tmp_path.iterdir())


def test_line_takes_the_quickest_of_its_models() -> None:
    rows = [
        {"sequence": "64", "time_ms_q50": "20"},
        {"sequence": "16", "time_ms_q50": "9"},
        {"sequence": "16", "time_ms_q50": "7"},
    ]
    assert list(best_line(rows, "sequence").items()) == [(16, 7.0), (64, 20.0)]
