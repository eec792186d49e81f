"""What was set out to be reached: speed-ups over dense torch of layers, blocks and encoders, by suite and case."""

from __future__ import annotations

from collections.abc import Mapping

from bench.harness import Row

# Rows from which on a target holds -> the speed-up over dense in float32, forward, hot weights.
_FORWARD: dict[str, Mapping[int, float]] = {
    "k8-attention": {1: 1.0, 32: 1.6, 1024: 1.7},
    **{case: {1: 3.0, 32: 5.5} for case in ("k8-w1", "k8-w2")},
    **{case: {1: 3.0, 32: 8.0} for case in ("k21-attention", "k21-w1", "k21-w2")},
    "balanced": {1: 5.0, 32: 13.0, 1024: 10.0},
    **{case: {1: 20.0, 32: 24.0, 1024: 18.0} for case in ("balanced-w1", "balanced-w2")},
    "k8-ffn": {32: 6.0},
    "k21-ffn": {32: 9.0},
    "balanced-ffn": {32: 16.0},
}
# In bfloat16 only where the processor multiplies matrices of it in hardware (AMX): the dense layer does so too.
_FORWARD_AMX: dict[str, Mapping[int, float]] = {
    "k8-attention": {1: 1.0, 32: 1.6},
    **{case: {1: 2.0, 32: 5.0} for case in ("k21-attention", "k21-w1", "k21-w2")},
    **{case: {1: 5.0, 32: 12.0} for case in ("balanced", "balanced-w1", "balanced-w2")},
    "k8-ffn": {32: 4.0},
    "k21-ffn": {32: 6.0},
    "balanced-ffn": {32: 9.0},
}
_BACKWARD: dict[str, Mapping[int, float]] = {
    "k8-attention": {1024: 1.6},
    **{case: {1024: 6.0} for case in ("k21-attention", "k21-w1", "k21-w2")},
    **{case: {1024: 7.0} for case in ("balanced", "balanced-w1", "balanced-w2")},
}
_ENCODER: dict[tuple[str, str], Mapping[str, float]] = {
    **{("fp32", shape): {"K8": 2.8, "K21": 5.0} for shape in ("1x128", "8x128")},
    ("fp32", "1x16"): {"K8": 2.0, "K21": 3.0},
    **{("bf16", shape): {"K8": 1.8, "K21": 3.0} for shape in ("1x128", "8x128")},
}


def target(row: Row) -> float | None:
    """Return the speed-up over dense to reach of a row of this package, None where none was set."""
    if row["weights"] != "hot" or (row["dtype"] == "bf16" and row["isa"] != "amx"):
        return None
    preset, _, form = row["variant"].partition(", ")
    if row["case"] == "bert-base" and form == "inference form":
        return _ENCODER.get((row["dtype"], row["input"]), {}).get(preset)
    if row["variant"] != "kron_kernels":
        return None
    forward = _FORWARD_AMX if row["dtype"] == "bf16" else _FORWARD
    table = {"forward": forward, "forward+backward": _BACKWARD if row["dtype"] == "fp32" else {}}
    by_rows = table.get(row["direction"], {}).get(row["case"], {})
    return next((by_rows[least] for least in sorted(by_rows, reverse=True) if int(row["input"]) >= least), None)
