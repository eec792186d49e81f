"""The pages of docs/results: what is shown, what is left out, and that they are what the result files give."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import report
from bench.harness import KEY, RESULTS, ROOT, ResultFile, Row, read_rows
from bench.report_accuracy import encoder_table, score_table
from bench.suites import Point
from bench.targets import target

MACHINE = {"machine": "a cpu, avx2, 2 cores, 2 threads", "isa": "avx2", "commit": "abc", "date": "2026-01-02"}
MACHINE |= {"python": "3.11", "torch": "2.13", "kron_kernels": "0.1"}


def add(folder: Path, suite: str, point: Point, variant: str, us: float, spread: float = 1.1, **more: object) -> None:
    base = {"status": "ok", "time_us_q10": us / spread**0.5, "time_us_q50": us, "time_us_q90": us * spread**0.5}
    speed = 1000 / us
    base |= {"speedup_q10": speed, "speedup_q50": speed, "speedup_q90": speed, "variant": variant}
    file = ResultFile(folder / f"{suite}.csv", ("factors", "saving", "peak_share", "parameters", "proof"))
    file.add(point, base | more, MACHINE)


def test_pages_are_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    report.main()


def test_an_edited_page_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu.md", "gpu.md", "accuracy.md", "summary.md"):
        text = (ROOT / "docs" / "results" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text + "more\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report", "--check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"cpu.md: not what .* gives: run python -m bench.report"):
        report.main()


def test_layers_show_best_stock_torch_and_targets(tmp_path: Path) -> None:
    point = Point("k8-w1", "forward", "fp32", "128")
    more = {"factors": "8x2 (x) 384x384", "saving": 7.8}
    for name, us in (("dense", 1000), ("matmul", 500), ("matmul, compiled", 250), ("PEFT", 2000)):
        add(tmp_path, "layers", point, name, us, **more)
    add(tmp_path, "layers", point, "kron_kernels", 200, peak_share=0.5, **more)
    page = report.cpu(tmp_path)
    assert "| k8-w1 | 8x2 ⊗ 384x384 | 7.8 | 5.00 ✗ (4.00) | 50% |" in page
    assert "Below target: 1 of 1" in page
    assert "| k8-w1 | kron_kernels | forward | fp32 | 128 | 5.00 (5.00 to 5.00) | 5.5 |" in page


def test_sentence_encoders_stand_beside_their_teacher() -> None:
    common = {
        "teacher": "bert",
        "task": "stsb",
        "bytes": 4_000_000,
        "parameters": 1_000_000,
        "minutes": "",
        "steps": "",
    }
    rows: list[Row] = [{**common, "model": "teacher", "variant": "", "score": "80.0"}]
    rows.append({**common, "model": "8x", "variant": "int4", "score": "60.0", "minutes": "31.0", "steps": "1700"})
    page = encoder_table(rows)
    assert "| bert | stsb | teacher | 1.00M | 4.0 MB | 80.0 | 100.0% | - | - |" in page
    assert "| bert | stsb | 8x, int4 | 1.00M | 4.0 MB | 60.0 | 75.0% | 31.0 | 1700 |" in page


def test_disturbed_runs_are_left_out(tmp_path: Path) -> None:
    calm, stalled = Point("k8-w1", "forward", "fp32", "128"), Point("k8-w1", "forward", "fp32", "1")
    for point, spread in ((calm, 1.1), (stalled, 3.5)):
        add(tmp_path, "layers", point, "dense", 1000, spread)
        add(tmp_path, "layers", point, "kron_kernels", 2)
    add(tmp_path, "layers", calm, "matmul", 400, 3.5)
    rows = report.steady(read_rows(tmp_path / "layers.csv"))
    assert [(row["input"], row["variant"]) for row in rows] == [("128", "dense"), ("128", "kron_kernels")]
    assert all(float(row["speedup_q50"]) < 200 for name in report.SUITES for row in read_rows(RESULTS / f"{name}.csv"))


def test_encoder_table_and_plot(tmp_path: Path) -> None:
    for shape in ("1x128", "8x128"):
        point = Point("bert-base", "forward", "fp32", shape)
        add(tmp_path, "encoder", point, "dense", 1000, memory_mib=440, error=1e-7)
        add(tmp_path, "encoder", point, "K8, inference form", 250, memory_mib=60)
        add(tmp_path, "encoder", point, "OpenVINO, int8", 500, error=0.03)
    page = report.cpu(tmp_path)
    assert "| fp32 | 1x128 | 1 ms | 4.00 ✓ | 2.00 |" in page
    assert "| fp32 | 1x128 | 440 | 60 |" in page
    assert "| 1x128 | 3.0e-02 |" in page
    assert "| OpenVINO, int8 | 0.5 (2.0x) | 0.5 (2.0x) |" in report.summary(tmp_path)
    report.plot(read_rows(tmp_path / "encoder.csv"), tmp_path / "encoder.png")
    assert (tmp_path / "encoder.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_page_shows_the_proof_beside_every_figure(tmp_path: Path) -> None:
    assert "none was measured yet" in report.gpu(tmp_path)
    add(tmp_path, "gpu", Point("k8-ffn", "forward", "bf16", "4096"), "cuda", 100, proof="smoke: error 1e-1")
    assert "| k8-ffn | forward | 4096 | cuda | smoke: error 1e-1 | 100 | 10.00 |" in report.gpu(tmp_path)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, 5.5),
        ({"input": "1"}, 3.0),
        ({"weights": "cold"}, None),
        ({"variant": "matmul"}, None),
        ({"dtype": "bf16", "case": "k8-ffn"}, None),
        ({"dtype": "bf16", "isa": "amx", "case": "k8-ffn"}, 4.0),
        ({"direction": "forward+backward", "case": "balanced", "input": "4096"}, 7.0),
        ({"case": "bert-base", "variant": "K21, inference form", "input": "1x128"}, 5.0),
    ],
    ids=str,
)
def test_targets(changes: Row, wanted: float | None) -> None:
    row = dict(zip(KEY, ("k8-w1", "forward", "fp32", "128", "hot", "kron_kernels"), strict=True))
    assert target({**row, "isa": "avx512", **changes}) == wanted


def test_scores_are_means_over_seeds_and_kept_over_common_tasks() -> None:
    columns = ("name", "variant", "task", "score", "parameters")
    rows = [
        ("teacher", "", "stsb", "80", "2000000"),
        ("teacher", "", "rte", "60", "2000000"),
        *(("K8", "", "stsb", score, "500000") for score in ("70", "74")),
    ]
    table = score_table([dict(zip(columns, row, strict=True)) for row in rows])
    assert "| teacher | 80.0 | 60.0 | 70.0 | 100.0% | 2.00 M |" in table
    assert "| K8 | 72.0 ± 2.8 | - | 72.0 | 90.0% | 0.50 M |" in table
