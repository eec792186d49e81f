"""What was set out to be reached: speed-ups over dense torch, memory, time and accuracy of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Rows of x -> the speed-up to reach.
_K8_ATTENTION = {1: 1.0, 32: 1.6, 128: 1.6, 1024: 1.7, 4096: 1.7}
_K21 = {1: 3.0, 32: 8.0, 128: 8.0, 1024: 8.0, 4096: 8.0}
_K8_FFN = {1: 3.0, 32: 5.5, 128: 5.5, 1024: 5.5, 4096: 5.5}
_BALANCED_FFN = {1: 20.0, 32: 24.0, 128: 24.0, 1024: 18.0, 4096: 18.0}


def _flat(one: float, more: float) -> dict[int, float]:
    return {1: one, 32: more, 128: more, 1024: more, 4096: more}


def _from_32(reach: float) -> dict[int, float]:
    return {32: reach, 128: reach, 1024: reach, 4096: reach}


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
        "k8-ffn": _from_32(6.0),
        "k21-ffn": _from_32(9.0),
        "balanced-ffn": _from_32(16.0),
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
        "k8-ffn": _from_32(4.0),
        "k21-ffn": _from_32(6.0),
        "balanced-ffn": _from_32(9.0),
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


LAYERS = "12"
# Encoders: (dtype, batch, sequence) -> by preset, the speed-up over dense.
_ENCODER: dict[tuple[str, int, int], dict[str, float]] = {
    ("fp32", 1, 128): {"K8": 2.8, "K21": 5.0},
    ("fp32", 8, 128): {"K8": 2.8, "K21": 5.0},
    ("fp32", 1, 16): {"K8": 2.0, "K21": 3.0},
    ("bf16", 1, 128): {"K8": 1.8, "K21": 3.0},
    ("bf16", 8, 128): {"K8": 1.8, "K21": 3.0},
}
# The same over dense under torch.compile.
_ENCODER_OVER_COMPILED: dict[tuple[str, int, int], dict[str, float]] = {
    ("fp32", 1, 128): {"K8": 2.5, "K21": 4.5},
    ("fp32", 8, 128): {"K8": 2.5, "K21": 4.5},
}
# Peak memory of a process that runs 128 tokens a sequence, at most this share of dense's.
_PROCESS_MEMORY = {"K8": 0.45, "K21": 0.35}
# Of a distilled model, percent of the teacher's average score to keep.
_ACCURACY_KEPT = {"K8": 97.0, "K21": 93.0}
# A step of distillation in float32: at most this share of the time and of the memory of the best factored stock torch.
_STEP_SIZES = ("minilm", "bert-base")
_STEP_TIME, _STEP_MEMORY = 0.7, 0.6
# LoKr layers in float32, forward and backward: times faster than PEFT, and at most this share of its memory.
_LOKR_TIME, _LOKR_MEMORY, _LOKR_TOKENS = 3.0, 0.25, "4096"
# Layers of several terms over the better of their two einsums, and text of a whole model over the dense one.
_TERMS, _TEXT = 2.0, 1.0


@dataclass(frozen=True)
class Verdict:
    """A measured value beside the one to reach, None where none was set; ``at_most`` where less is better."""

    value: float
    reach: float | None
    at_most: bool = False

    @property
    def missed(self) -> bool:
        if self.reach is None:
            return False
        return self.value > self.reach if self.at_most else not self.value >= self.reach

    def __str__(self) -> str:
        if self.reach is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} {'✗' if self.missed else '✓'}"


def reach(case: str, dtype: str, direction: str, tokens: int, isa: str) -> float | None:
    """The speed-up to reach, None where none was set for this point or this processor."""
    if dtype == "bf16" and isa != "amx":
        return None
    return _REACH.get((dtype, direction), {}).get(case, {}).get(tokens)


def encoder_reach(row: Mapping[str, str], over_compiled: bool = False) -> float | None:
    """The speed-up to reach over dense, or over dense under torch.compile, of a row of model.csv.

    None where none was set; it was set for BERT-base's twelve layers.
    """
    dtype, batch, sequence = row["dtype"], int(row["batch"]), int(row["sequence"])
    if row["layers"] != LAYERS or (dtype == "bf16" and row["isa"] != "amx"):
        return None
    table = _ENCODER_OVER_COMPILED if over_compiled else _ENCODER
    return table.get((dtype, batch, sequence), {}).get(row["model"].removesuffix(", compiled"))


def process_reach(row: Mapping[str, str]) -> float | None:
    """The share of dense's peak memory to stay within, of a row of process.csv; None where none was set."""
    if (row["layers"], row["sequence"]) != (LAYERS, "128"):
        return None
    return _PROCESS_MEMORY.get(row["model"].removesuffix(", package").removesuffix(", folder"))


def accuracy_reach(model: str) -> float | None:
    """The percentage of its teacher's average score that a distilled model is to keep; None where none was set."""
    return _ACCURACY_KEPT.get(model)


def step_reach(row: Mapping[str, str]) -> tuple[float | None, float | None]:
    """The shares of stock torch's time and memory to stay within, of a row of distill-steps.csv; None where not set."""
    return (_STEP_TIME, _STEP_MEMORY) if row["size"] in _STEP_SIZES else (None, None)


def lokr_reach(row: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Times faster than PEFT and share of its memory, of a row of integrations-lokr.csv; None where none was set."""
    if (row["dtype"], row["direction"], row["tokens"]) != ("fp32", "forward+backward", _LOKR_TOKENS):
        return None, None
    return _LOKR_TIME, _LOKR_MEMORY


def terms_reach() -> float:
    """The speed-up of a layer of several terms over its einsums."""
    return _TERMS


def text_reach() -> float:
    """The speed-up of generated text over the dense model."""
    return _TEXT
