"""Whole encoders on a GPU: their forward, as it is and as one CUDA graph, and a step of training."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_machine import Machine
from bench.protocol import Say
from kron_kernels.backends.triton.problems import DTYPES
from kron_kernels.models.cuda_graph import record
from kron_kernels.testing.compare import first_line
from kron_kernels.testing.encoder import (
    EncoderProblem,
    EncoderWay,
    encoders,
    forward,
    plain_way,
    random_ids,
)

PRESETS = ("K8", "K21")
GRAPH = ", CUDA graph"
# Of an encoder that an interpreter runs.
REHEARSED_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
_WARM_STEPS, _STEPS = 3, 10


def _models(job: dict[str, Any], device: str, dtype: str) -> dict[str, nn.Module]:
    sizes = REHEARSED_SIZES if job["rehearse"] else {}
    presets = PRESETS[:1] if job["rehearse"] else PRESETS
    return {name: model.to(device) for name, model in encoders(presets, DTYPES[dtype], **sizes).items()}


def encoder_points(job: dict[str, Any], say: Say, machine: Machine) -> None:
    """Dense and compressed encoders at each batch size and length; on a GPU also as graphs."""
    for described in job["points"]:
        models = _models(job, machine.device, described["dtype"])
        ids = random_ids(models["dense"], described["batch"], described["sequence"]).to(machine.device)
        problem = EncoderProblem(ids)
        makers: dict[str, Callable[[EncoderProblem], EncoderWay]] = {
            name: functools.partial(_plain, name, model) for name, model in models.items()
        }
        if machine.device == "cuda":
            makers |= {name + GRAPH: functools.partial(graph_way, name, model) for name, model in models.items()}
        for _, row in machine.compared(makers, problem, job["seconds"], say):
            say({"point": described["index"], "result": row})
        say({"done": described["index"]})


def _plain(name: str, model: nn.Module, _problem: EncoderProblem) -> EncoderWay:
    return plain_way(name, model)


def graph_way(name: str, model: nn.Module, problem: EncoderProblem) -> EncoderWay:
    """The forward of the problem's ids captured once, replayed after."""
    replay, hidden = record(lambda: forward(model, problem.ids), problem.ids.device)

    def run(_ids: Tensor) -> Tensor:
        replay()
        return hidden

    return EncoderWay(name + GRAPH, model, run, plain_way(name, model).tolerance)


def train_points(job: dict[str, Any], say: Say, machine: Machine) -> None:
    """Milliseconds and peak memory of one step: forward, a squared loss, backward, AdamW."""
    for described in job["points"]:
        for name, model in _models(job, machine.device, described["dtype"]).items():
            say({"starting": name})
            ids = random_ids(model, described["batch"], described["sequence"]).to(machine.device)
            try:
                row = _train(model, ids, job["rehearse"])
            except Exception as failure:  # a kernel that fails must not end the run
                row = {"status": "failed", "reason": first_line(failure)}
            say({"point": described["index"], "result": {"variant": name, **row}})
        say({"done": described["index"]})


def _train(model: nn.Module, ids: Tensor, rehearse: bool) -> dict[str, Any]:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step = functools.partial(_step, model, optimiser, ids)
    losses = [float(step()) for _ in range(1 if rehearse else _WARM_STEPS)]
    if any(loss != loss for loss in losses):
        return {"status": "wrong", "reason": f"losses {losses}"}
    return {"status": "ok", **(_timed_steps(step) if ids.is_cuda else {})}


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss = model(ids).last_hidden_state.float().square().mean()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def _timed_steps(step: Callable[[], Tensor]) -> dict[str, float]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"time_us_q50": 1e6 * statistics.median(times), "peak_mib": torch.cuda.max_memory_allocated() / 2**20}
