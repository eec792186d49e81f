"""The README's tables of the integrations: from their result files, with what fell short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.harness import ResultFile
from bench.integrations.lokr import COLUMNS, KEY
from bench.report import render_integrations
from bench.report_integrations import gpt2_parts, judged_gpt2, judged_lokr, lokr_parts, transform_parts

Row = dict[str, Any]


def lokr(variant: str, part: str = "layer", **changes: Any) -> Row:
    row = {"dtype": "fp32", "direction": "forward+backward", "tokens": "4096", "part": part, "layer": "3072-12288"}
    row |= {"adapter": "rank 16", "variant": variant, "status": "ok", "ceiling": "2.5", "time_ms_q50": "100"}
    row |= {f"{name}_{q}": "" for name in ("over_peft", "over_base", "speedup") for q in ("q10", "q50", "q90")}
    return row | {"peak_mib": "40", "adapter_mib": "" if part == "adapter" else "30"} | changes


def ours_over_peft(value: float, **changes: Any) -> Row:
    quantiles = {f"over_peft_{q}": str(value * f) for q, f in (("q10", 0.9), ("q50", 1.0), ("q90", 1.1))}
    return lokr("kron_kernels", **{**quantiles, **changes})


def test_lokr_beside_its_reach() -> None:
    rows = [
        lokr("PEFT", time_ms_q50="230", adapter_mib="100"),
        lokr("LyCORIS, bypass", time_ms_q50="150"),
        ours_over_peft(2.3),
        lokr("PEFT", "adapter", peak_mib="200"),
        ours_over_peft(8.0, part="adapter", adapter_mib=""),
        ours_over_peft(1.9, direction="forward"),
    ]
    title, table, folded = lokr_parts(rows)
    assert "fp32, forward+backward, 4096 tokens" in title
    assert (
        "| 3072 → 12288, rank 16 | with its layer | 100 | 2.30 (2.07 to 2.53) ✗ | 2.5 | 1.50 | - | - "
        "| 30 | 100 | 0.30 ✗ |" in table
    )
    assert "| alone | 100 | 8.00 (7.20 to 8.80) ✓ | 2.5 | - | - | - | 40 | 200 | 0.20 ✓ |" in table
    assert "LoKr adapters, fp32, forward, 4096 tokens" in folded
    assert "1.90 (1.71 to 2.09) |" in folded, "without a reach"
    judged = list(judged_lokr(rows))
    assert [(each.what, each.verdict.missed) for each in judged if each.verdict.reach] == [
        ("LoKr with its layer, over PEFT", True),
        ("LoKr with its layer, share of the memory of PEFT", True),
        ("LoKr alone, over PEFT", False),
        ("LoKr alone, share of the memory of PEFT", False),
    ]
    assert judged[0].note == "operations allow 2.5"


def gpt2(variant: str, case: str = "c_fc", direction: str = "forward", **changes: Any) -> Row:
    row = {"case": case, "direction": direction, "tokens": "128", "variant": variant, "status": "ok"}
    row |= {"factors": "4 of 768x384 (x) 4x2", "saving": "0.99", "tokens_per_second": ""}
    names = ("speedup", "over_a_first", "over_b_first")
    return row | {f"{name}_{q}": "" for name in names for q in ("q10", "q50", "q90")} | changes


def three(name: str, value: float) -> Row:
    return {f"{name}_{q}": str(value * f) for q, f in (("q10", 0.9), ("q50", 1.0), ("q90", 1.1))}


def test_gpt2_over_the_better_einsum_and_dense() -> None:
    rows = [
        gpt2("kron_kernels", **three("speedup", 1.2), **three("over_a_first", 1.8), **three("over_b_first", 2.6)),
        gpt2("kron_kernels", "c_proj", **three("over_b_first", 2.5)),
        gpt2("kron_kernels", "untimed"),
        gpt2("dense", "gpt2-small", "generation", tokens_per_second="20", **three("speedup", 1.0)),
        gpt2("KnGPT2", "gpt2-small", "generation", tokens_per_second="24", **three("speedup", 1.2)),
        gpt2("einsum A first", "c_fc", status="wrong"),
    ]
    _, layers, title, texts = gpt2_parts(rows)
    assert (
        "| c_fc | 4 of 768x384 ⊗ 4x2 | forward | 128 | 0.99 | 1.80 (1.62 to 1.98) ✗ | 1.20 (1.08 to 1.32) |" in layers
    )
    assert "2.50 (2.25 to 2.75) ✓" in layers
    assert "| untimed | 4 of 768x384 ⊗ 4x2 | forward | 128 | 0.99 | - | - |" in layers
    assert "batch 1" in title
    assert "| dense | 20.0 | 1 |" in texts
    assert "| KnGPT2 | 24.0 | 1.20 (1.08 to 1.32) ✓ |" in texts
    assert [(each.what, each.verdict.missed) for each in judged_gpt2(rows)] == [
        ("c_fc, over the better einsum", True),
        ("c_proj, over the better einsum", False),
        ("text from GPT-2 small, over dense", False),
    ]


def test_transforms_over_the_first_way() -> None:
    point = {"case": "768", "dtype": "bf16", "tokens": "128", "left": "24", "right": "32", "status": "ok"}
    rows = [{**point, "way": "matmuls", **three("speedup", 1.0)}, {**point, "way": "ours", **three("speedup", 3.0)}]
    title, table = transform_parts(rows)
    assert title.endswith("times faster than matmuls")
    assert "| width | dtype | T | ours |" in table
    assert "| 768: 24x24 ⊗ 32x32 | bf16 | 128 | 3.00 (2.70 to 3.30) |" in table


def test_a_page_has_the_tables_of_each_machine(tmp_path: Path) -> None:
    for cpu, value in (("One CPU", 2.3), ("Other CPU", 4.0)):
        row = ours_over_peft(value) | {"cpu": cpu, "isa": "avx2", "cores": "2", "threads": "2"}
        ResultFile(tmp_path / "integrations-lokr.csv", KEY, COLUMNS).add([row])
    page = render_integrations(tmp_path)
    one, other = page.index("**One CPU, 2 cores, kernels at avx2**"), page.index("**Other CPU, 2 cores")
    assert one < page.index("2.30 (2.07 to 2.53) ✗") < other < page.index("4.00 (3.60 to 4.40) ✓")


def test_nothing_measured_gives_nothing() -> None:
    assert lokr_parts([]) == gpt2_parts([]) == transform_parts([]) == []
