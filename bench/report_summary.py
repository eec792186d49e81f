"""The summary for the README: a BERT-base encoder against what a user would take instead, and accuracy kept."""

from __future__ import annotations

from pathlib import Path

from bench.harness import Row, read_rows
from bench.report_accuracy import TEACHER, encoder_table, score_table
from kron_kernels.testing.tables import markdown

SHAPES = ("1x128", "8x128")
# Label -> dtype and variant of encoder.csv.
ROWS = {
    "torch, float32": ("fp32", "dense"),
    "torch, compiled, float32": ("fp32", "dense, compiled"),
    "torch, bfloat16": ("bf16", "dense"),
    "OpenVINO, int8": ("fp32", "OpenVINO, int8"),
    "ONNX Runtime, int8": ("fp32", "ONNX Runtime, int8"),
    "K8 (7 times fewer parameters), training form": ("fp32", "K8"),
    "K8, inference form": ("fp32", "K8, inference form"),
    "K21 (21 times fewer parameters), inference form": ("fp32", "K21, inference form"),
}
ABOUT = """# Summary

Milliseconds of a BERT-base encoder's forward (random weights: cost does not depend on the values), batch x tokens, and
how many times faster than dense torch in float32; medians."""


def summary(results: Path) -> str:
    """Return the page: of each machine that has the dense rows, the one measured last first, then accuracy."""
    rows = [row for row in read_rows(results / "encoder.csv") if row["case"] == "bert-base" and row["time_us_q50"]]
    rows.sort(key=lambda row: row["date"], reverse=True)
    parts = [ABOUT]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        found = {(row["input"], row["dtype"], row["variant"]): row for row in rows if row["machine"] == machine}
        lines = [(label, *(_cell(found, shape, *key) for shape in SHAPES)) for label, key in ROWS.items()]
        parts += [f"## {machine}", markdown(("", *SHAPES), lines)]
    if encoders := read_rows(results / "encoders.csv"):
        parts += ["## Sentence encoders, distilled on plain text", encoder_table(encoders)]
    scored = [row for row in read_rows(results / "accuracy.csv") if row["score"] and not row["variant"]]
    main = [row for row in scored if row["kind"] == "task" or row["name"] == TEACHER]
    return "\n\n".join([*parts, "## Accuracy kept after distillation", score_table(main)]) + "\n"


def _cell(found: dict[tuple[str, str, str], Row], shape: str, dtype: str, variant: str) -> str:
    row, dense = found.get((shape, dtype, variant)), found.get((shape, "fp32", "dense"))
    if row is None or dense is None:
        return "-"
    # Another dtype was timed in another process: the quotient of medians.
    ratio = float(dense["time_us_q50"]) / float(row["time_us_q50"]) if dtype != "fp32" else float(row["speedup_q50"])
    noisy = ", noisy" if row["status"] == "noisy" else ""
    return f"{float(row['time_us_q50']) / 1e3:.1f} ({ratio:.1f}x{noisy})"
