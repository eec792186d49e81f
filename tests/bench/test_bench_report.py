"""The README's tables: made from the result files, losses included, and up to date."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.harness import RESULTS, ROOT, ResultFile
from bench.plots import plot_layers
from bench.points import COLUMNS, POINT_KEY, Point, complete
from bench.report import BEGIN, END, NONE_YET, fill, render, render_integrations
from bench.targets import Verdict, reach

MACHINE = {
    "commit": "abc",
    "date": "2026-01-01",
    "cpu": "Some CPU",
    "isa": "avx2",
    "cores": 2,
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.13.0",
}


def row(case: str, tokens: int, variant: str, speedup: float, **changes: Any) -> dict[str, Any]:
    result = {
        "variant": variant,
        "status": "ok",
        "time_us_q50": 100.0 / speedup,
        "speedup_q10": speedup * 0.9,
        "speedup_q50": speedup,
        "speedup_q90": speedup * 1.1,
        "over_peak": speedup,
        "peak_flop": 10**9,
        "peak_gflops": 200.0,
    }
    point = Point(case, "fp32", False, 1, tokens)
    return {**complete(point, {**result, **changes}), **MACHINE}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    file = ResultFile(tmp_path / "layers.csv", (*POINT_KEY, "variant"), COLUMNS)
    file.add(
        [
            row("balanced", 1, "kron_kernels", 6.0),
            row("balanced", 1, "matmul A first", 2.0),
            row("balanced", 1, "matmul B first", 2.5),
            row("balanced", 32, "kron_kernels", 12.5),
            row("balanced", 32, "dense, packed", 1.25),
            {
                **row("balanced", 32, "LyCORIS", 1.0),
                "status": "crashed",
                "reason": "died of SIGFPE",
                "speedup_q50": None,
            },
        ]
    )
    return tmp_path


def test_reach_follows_dtype_direction_rows_and_processor() -> None:
    assert reach("k8-attention", "fp32", "forward", 1024, "avx2") == 1.7
    assert reach("k21-w2", "fp32", "forward", 1, "avx2") == 3
    assert reach("balanced", "fp32", "forward+backward", 4096, "avx512") == 7
    assert reach("balanced", "fp32", "forward+backward", 128, "avx512") is None
    assert reach("balanced", "bf16", "forward", 128, "amx") == 12
    assert reach("balanced", "bf16", "forward", 128, "avx512") is None
    assert reach("k21-ffn", "fp32", "forward", 32, "avx2") == 9
    assert reach("k21-ffn", "fp32", "forward", 1, "avx2") is None
    assert reach("k8-ffn", "bf16", "forward", 4096, "amx") == 4
    assert [str(Verdict(speedup, wanted)) for speedup, wanted in ((2.0, 2.0), (1.99, 2.0), (3.0, None))] == [
        "2.00 ✓",
        "1.99 ✗",
        "3.00",
    ]


def test_tables_show_what_was_met_and_what_falls_short(results: Path) -> None:
    text = render(results)
    assert "| balanced | 24x24 ⊗ 32x32 | 13.7 | 6.00 ✓ | 12.50 ✗ |" in text
    assert "| balanced | 1 | 6.00 (5.40 to 6.60) | 2.50 (matmul B first) | - | - |" in text
    assert "| balanced | 32 | 12.50 (11.25 to 13.75) | - | 1.25 | - |" in text
    assert "**What falls short** (1 of 2 figures with a reach)" in text
    assert "| balanced | fp32, forward, T = 32 | 12.50 (11.25 to 13.75) | ≥ 13 |" in text
    assert "| LyCORIS | crashed | died of SIGFPE | balanced | 1 |" in text
    assert "Some CPU, 2 cores, kernels at avx2" in text


def test_the_machine_measured_last_comes_first(results: Path) -> None:
    file = ResultFile(results / "layers.csv", (*POINT_KEY, "variant"), COLUMNS)
    file.add([{**row("balanced", 1, "kron_kernels", 6.0), "cpu": "New CPU", "date": "2999-01-01"}])
    text = render(results)
    assert 0 < text.index("### New CPU") < text.index("### Some CPU")


def test_fill_replaces_only_what_is_between_the_markers() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    filled = fill(readme, "\nnew\n\n")
    assert filled == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert fill(filled, "\nnew\n\n") == filled
    with pytest.raises(ValueError, match="readme: expected"):
        fill("no markers", "new")


def test_main_writes_and_checks(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = results / "README.md"
    docs = results / "integrations.md"
    command = ["report", "--results", str(results), "--readme", str(readme), "--integrations", str(docs)]
    monkeypatch.setattr("sys.argv", command)
    report.main()
    report.main()
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    report.main()
    readme.write_text(readme.read_text().replace("12.50", "99.00"))
    with pytest.raises(SystemExit, match=r"README\.md is not .* run python -m bench\.report"):
        report.main()
    readme.write_text(readme.read_text().replace("99.00", "12.50"))
    docs.write_text(docs.read_text().replace(NONE_YET, "something else"))
    with pytest.raises(SystemExit, match=r"integrations\.md is not .* run python -m bench\.report"):
        report.main()


def test_plot_is_written(results: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_layers(results)
    assert (results / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_no_results_is_said(tmp_path: Path) -> None:
    assert NONE_YET in render(tmp_path)


@pytest.mark.parametrize(("page", "make"), [("README.md", render), ("docs/integrations.md", render_integrations)])
def test_pages_are_what_the_results_give(page: str, make: Callable[[Path], str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, make(RESULTS)) == text, "run python -m bench.report"
