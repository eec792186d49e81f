"""What the kernels set out to reach: median speed-up over dense torch, by case, dtype, direction and rows."""

from __future__ import annotations

from dataclasses import dataclass

# Rows of x -> the speed-up to reach.
_K8_ATTENTION = {1: 1.0, 32: 1.6, 128: 1.6, 1024: 1.7, 4096: 1.7}
_K21 = {1: 3.0, 32: 8.0, 128: 8.0, 1024: 8.0, 4096: 8.0}
_K8_FFN = {1: 3.0, 32: 5.5, 128: 5.5, 1024: 5.5, 4096: 5.5}
_BALANCED_FFN = {1: 20.0, 32: 24.0, 128: 24.0, 1024: 18.0, 4096: 18.0}


def _flat(one: float, more: float) -> dict[int, float]:
    return {1: one, 32: more, 128: more, 1024: more, 4096: more}


def _whole_batches(reach: float) -> dict[int, float]:
    return {1024: reach, 4096: reach}


_REACH: dict[tuple[str, str], dict[str, dict[int, float]]] = {
    ("fp32", "forward"): {
        "k8-attention": _K8_ATTENTION,
        "k21-attention": _K21,
        "k8-w1": _K8_FFN,
        "k8-w2": _K8_FFN,
        "k21-w1": _K21,
        "k21-w2": _K21,
        "balanced": {1: 5.0, 32: 13.0, 128: 13.0, 1024: 10.0, 4096: 10.0},
        "balanced-w1": _BALANCED_FFN,
        "balanced-w2": _BALANCED_FFN,
    },
    # Only where the processor multiplies bfloat16 matrices in hardware (AMX): the dense layer does so too.
    ("bf16", "forward"): {
        "balanced": _flat(5.0, 12.0),
        "balanced-w1": _flat(5.0, 12.0),
        "balanced-w2": _flat(5.0, 12.0),
        "k21-attention": _flat(2.0, 5.0),
        "k21-w1": _flat(2.0, 5.0),
        "k21-w2": _flat(2.0, 5.0),
        "k8-attention": _flat(1.0, 1.6),
    },
    ("fp32", "forward+backward"): {
        "balanced": _whole_batches(7.0),
        "balanced-w1": _whole_batches(7.0),
        "balanced-w2": _whole_batches(7.0),
        "k21-attention": _whole_batches(6.0),
        "k21-w1": _whole_batches(6.0),
        "k21-w2": _whole_batches(6.0),
        "k8-attention": _whole_batches(1.6),
    },
}


@dataclass(frozen=True)
class Verdict:
    """A measured speed-up beside the one to reach; ``reach`` is None where none was set."""

    speedup: float
    reach: float | None

    def __str__(self) -> str:
        if self.reach is None:
            return f"{self.speedup:.2f}"
        sign = "✓" if self.speedup >= self.reach else "✗"
        return f"{self.speedup:.2f} {sign}"


def reach(case: str, dtype: str, direction: str, tokens: int, isa: str) -> float | None:
    """The speed-up to reach, None where none was set for this point or this processor."""
    if dtype == "bf16" and isa != "amx":
        return None
    return _REACH.get((dtype, direction), {}).get(case, {}).get(tokens)
