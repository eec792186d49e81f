"""Where the time of an encoder goes: its top-level ops from torch's profiler, told apart by the order they come in.

Nothing is hooked into the model, so fused and unfused models are traced alike. What lies between the ops (Python, the
dispatcher, allocation) is the framework's part. The traced time is set beside the untraced one of the same rounds: the
gap between them is what tracing itself costs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd import profiler

from .encoder import forward

# In the order of the model. A fused op counts whole where its product belongs: `kron_matmul_norm` as output projection,
# and `kron_ffn` as FFN, each with its residual and LayerNorm; the embedding has its LayerNorm always.
PARTS = ("embedding", "QKV", "attention", "output projection", "FFN", "LayerNorm", "pooler", "framework")

_LINEAR = {"aten::linear", "aten::addmm", "aten::matmul", "kron_kernels::kron_matmul", "kron_kernels::kron_qkv"}
_ATTENTION = {"aten::scaled_dot_product_attention"}
_NORM = {"aten::layer_norm", "aten::native_layer_norm"}
_OUTPUT_AND_NORM = {"kron_kernels::kron_matmul_norm"}
_FFN = {"kron_kernels::kron_ffn"}
_EMBEDDING = {"kron_kernels::kron_embedding"}
_LOOK_UP = {"aten::embedding", *_EMBEDDING}
_ADD = {"aten::add", "aten::add_"}
# Whether packed factors still belong to a parameter: asked between the parts, and part of none.
_BOOKKEEPING = {"aten::is_set_to"}


class Op(NamedTuple):
    """A top-level op of one forward: name, and seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Seconds of each of ``PARTS`` in one forward, medians over the forwards; they add up to about ``traced``.

    ``traced`` and ``untraced`` are medians of a forward's seconds with and without tracing, in alternation.
    """

    parts: Mapping[str, float]
    traced: float
    untraced: float

    @property
    def gap(self) -> float:
        """How much longer the parts together took than the untraced forward, as a share of it; negative: shorter."""
        return sum(self.parts.values()) / self.untraced - 1


def profile_forward(model: nn.Module, ids: Tensor, *, seconds: float = 2.0, min_rounds: int = 3) -> Profile:
    """Trace forwards of a BERT encoder on token ids ``(batch, sequence)``, in turn with untraced ones.

    Args:
        model: a BertModel or one with Kronecker layers, called as ``model(ids)``.
        ids: token ids.
        seconds: time to spend, half of it untraced.
        min_rounds: least number of rounds, each some untraced and as many traced forwards.

    Raises:
        RuntimeError: the forward has no attention that could be recognised (``scaled_dot_product_attention``).
    """
    once = min(_timed(model, ids) for _ in range(3))
    rounds = max(min_rounds, min(8, int(seconds / 2 / once)))
    calls = max(1, round(seconds / 2 / rounds / once))
    untraced: list[float] = []
    traced: list[float] = []
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(rounds):
        untraced += [_timed(model, ids) for _ in range(calls)]
        for total, ops in _trace(model, ids, calls):
            found = sort_ops(ops)
            found["framework"] += total - sum(op.seconds for op in ops)
            traced.append(total)
            for part in PARTS:
                parts[part].append(found[part])
    medians = {part: statistics.median(sample) for part, sample in parts.items()}
    return Profile(medians, statistics.median(traced), statistics.median(untraced))


def sort_ops(ops: Iterable[Op]) -> dict[str, float]:
    """Seconds by part of the top-level ops of one forward, in the order they ran.

    The attention op and the norms say where in a layer an op is: products before attention are QKV, after it the output
    projection, after the norm the FFN; what comes after the last layer is the pooler.

    Raises:
        RuntimeError: there is no attention op.
    """
    ops = list(ops)
    attentions = [index for index, op in enumerate(ops) if op.name in _ATTENTION]
    if not attentions:
        raise RuntimeError("ops: expected scaled_dot_product_attention among them: is the model's attention SDPA?")
    look_ups = [index for index, op in enumerate(ops) if op.name in _LOOK_UP]
    last_block_end = max(index for index, op in enumerate(ops) if op.name in _NORM | _OUTPUT_AND_NORM | _FFN)
    seconds = dict.fromkeys(PARTS, 0.0)
    stage = "start"  # -> embedding -> before -> heads -> after -> ffn -> before ... -> pooler
    for index, (name, took) in enumerate(ops):
        if name in _BOOKKEEPING:
            seconds["framework"] += took
            continue
        if stage == "start" and look_ups and index >= look_ups[0]:
            stage = "embedding"
        if stage in ("start", "embedding"):
            seconds["embedding" if stage == "embedding" else "framework"] += took
            if stage == "embedding" and index >= look_ups[-1] and name in _NORM | _EMBEDDING:
                stage = "before"
            continue
        if index > last_block_end:
            seconds["pooler"] += took
        elif name in _ATTENTION:
            seconds["attention"] += took
            stage = "after"
        elif name in _FFN:
            seconds["FFN"] += took
            stage = "before"
        elif name in _OUTPUT_AND_NORM:
            seconds["FFN" if stage == "ffn" else "output projection"] += took
            stage = "before" if stage == "ffn" else "ffn"
        elif name in _NORM:
            seconds["LayerNorm"] += took
            stage = {"after": "ffn", "ffn": "before"}.get(stage, stage)
        elif stage in ("before", "heads"):
            if name in _LINEAR:
                seconds["QKV"] += took
                stage = "heads"
            elif stage == "heads":  # reshaping to heads
                seconds["attention"] += took
            else:  # the residual of an FFN that is one op without its norm; else masks, which are no part's
                seconds["LayerNorm" if name in _ADD else "framework"] += took
        elif stage == "after":
            seconds["output projection" if name in _LINEAR else "LayerNorm" if name in _ADD else "attention"] += took
        else:
            seconds["LayerNorm" if name in _ADD else "FFN"] += took
    return seconds


def _timed(model: nn.Module, ids: Tensor) -> float:
    start = time.perf_counter()
    forward(model, ids)
    return time.perf_counter() - start


def _trace(model: nn.Module, ids: Tensor, calls: int) -> list[tuple[float, list[Op]]]:
    """Seconds and top-level ops of each of ``calls`` traced forwards."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use; else every trace writes to stderr
    with profiler.profile(use_cpu=True, use_kineto=False) as trace:
        for _ in range(calls):
            with profiler.record_function(_FORWARD):
                forward(model, ids)
    found = []
    for event in trace.function_events or ():
        if event.name == _FORWARD:
            children = sorted(event.cpu_children, key=lambda child: child.time_range.start)
            ops = [Op(child.name, child.time_range.elapsed_us() / 1e6) for child in children]
            found.append((event.time_range.elapsed_us() / 1e6, ops))
    return found


_FORWARD = "kron_kernels: one forward"
