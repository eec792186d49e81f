"""Everything a GPU is needed for, in one command with a limit of time: ``python -m bench.run gpu --minutes 15``.

Rows go to gpu.csv, the outcome of each step to gpu.json, the faster backend of each call to choices.json, all in --out.
Times are always written; the column ``proof`` says whether the steps that prove an op correct passed. ``--quick``
rehearses all of it on the CPU: interpreted Triton kernels, tiny shapes, figures that mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench import harness
from bench.baselines import OPS, op_candidate
from bench.suites import Missing, Point
from bench.suites import gpu_steps as steps
from bench.suites import layers as ops
from kron_kernels.testing.encoder import EncoderCandidate, EncoderProblem, as_it_is, encoders, forward, random_ids
from kron_kernels.testing.problems import Candidate, Case, Layer, OpProblem
from kron_kernels.testing.timing import CudaClock, Timing

SECONDS = 0.1
COLUMNS = ("proof", "wall_us", "launches", "floor_us", "floor_share")
# What matters most comes first: time may run out.
CASES = (
    *("k8-ffn", "k21-ffn", "k8-attention", "k21-attention", "k8-qkv", "k21-qkv", "balanced", "k8-w1", "k8-w2"),
    *("k21-w1", "k21-w2", "balanced-w1", "balanced-w2", "tq-w1", "tq-w2", "balanced-ffn"),
)
TOKENS = ("32768", "4096", "128")
BACKENDS = ("kron_kernels", "triton", "cuda")
SLOW = ("dense", "dense, compiled", "matmul, compiled", "LyCORIS")
PRESETS = ("K8", "K21")
GRAPH, COMPILED = ", CUDA graph", ", compiled"
ops.ALL_CASES["tiny"] = Case("kron_matmul", (Layer((6, 4), (5, 3)),))
_TINY = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
ON_GPU = torch.cuda.is_available()


def silence(name: str) -> float:
    """Seconds after which a candidate that says nothing is taken for hung; compilers and imports take longer."""
    return 120.0 if "compiled" in name or name in ("start", "timing") else 20.0


def points(quick: bool) -> list[Point]:
    if quick:
        return [Point("tiny", "forward", "fp32", "5"), Point("tiny", "forward+backward", "fp32", "5")]
    found = []
    for tokens in TOKENS:
        found += [Point(case, "forward", "bf16", tokens) for case in CASES]
        found += [Point(case, "forward+backward", "bf16", tokens) for case in CASES if "qkv" not in case]
        if tokens == TOKENS[0]:
            found += [Point("encoder", "forward", "bf16", "256x128"), Point("encoder", "forward", "bf16", "1x128")]
            found += [Point("encoder", "step", "bf16", "32x128")]
    return found


def groups(point: Point) -> list[tuple[str, ...]]:
    """The quick candidates, then those that take long to make."""
    if point.case != "encoder":
        return [("dense", "matmul", *BACKENDS), SLOW]
    return [("dense", *PRESETS, *(name + GRAPH for name in ("dense", *PRESETS)), "dense" + COMPILED)]


def problem(point: Point) -> Any:
    if point.case == "encoder":
        return StepProblem(point) if point.direction == "step" else ForwardProblem(point)
    device = "cuda" if ON_GPU else "cpu"
    return OpProblem(ops.ALL_CASES[point.case], *point.sizes, ops.DTYPES[point.dtype], point.backward, 1, device)


def candidate(problem: Any, name: str) -> Any:
    return op_candidate(problem, name) if isinstance(problem, OpProblem) else problem.candidate(name)


def options() -> dict[str, Any]:
    """Times of wrong candidates too: on a machine had for minutes every figure counts."""
    return {"time_wrong": True, **({"clock": _clock(), "max_rounds": 100, "min_rounds": 7} if ON_GPU else {})}


@functools.cache
def _clock() -> CudaClock:
    return CudaClock()


class _Models:
    """BERT-base, dense and compressed, on the device."""

    def __init__(self, point: Point) -> None:
        models = encoders(PRESETS, ops.DTYPES[point.dtype], **({} if ON_GPU else _TINY))
        self.models = {name: model.to("cuda" if ON_GPU else "cpu") for name, model in models.items()}


class ForwardProblem(_Models, EncoderProblem):
    """Forwards of a batch of ids, eager, compiled and as one CUDA graph."""

    def __init__(self, point: Point) -> None:
        _Models.__init__(self, point)
        dense = self.models["dense"]
        EncoderProblem.__init__(self, random_ids(dense, *point.sizes).to(next(dense.parameters()).device))

    def candidate(self, name: str) -> EncoderCandidate:
        base = name.partition(",")[0]
        plain = as_it_is(name, self.models[base])
        if name.endswith(COMPILED):
            torch.compiler.reset()
            run = functools.partial(forward, torch.compile(plain.model, dynamic=False))
        elif name.endswith(GRAPH):
            from kron_kernels.models.cuda_graph import record

            if not ON_GPU:
                raise Missing("a CUDA device only")
            replay, hidden = record(lambda: forward(plain.model, self.ids), self.ids.device)
            run = functools.partial(_replayed, replay, hidden)
        else:
            return plain
        return EncoderCandidate(name, plain.model, run, plain.tolerance)


def _replayed(replay: Callable[[], object], hidden: Tensor, _ids: Tensor) -> Tensor:
    replay()
    return hidden


class StepProblem(_Models):
    """A training step: forward, a squared loss, backward, AdamW. Its error is that of the step's loss, to be finite."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.ids = random_ids(self.models["dense"], *point.sizes)

    def candidate(self, name: str) -> Candidate:
        if name not in self.models:
            raise Missing("forward only")
        model = self.models[name].train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
        return Candidate(name, functools.partial(_step, model, optimiser, self.ids.to(next(model.parameters()).device)))

    def tolerance(self, _candidate: Candidate) -> float:
        return 0.0

    def error(self, candidate: Candidate) -> float:
        return 0.0 if bool(torch.isfinite(candidate.function())) else float("nan")

    def runner(self, candidate: Candidate) -> Callable[[], object]:
        return candidate.function


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss = model(ids).last_hidden_state.float().square().mean()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def columns(problem: Any, candidate: Any, timings: Mapping[str, Timing | None]) -> dict[str, Any]:
    """Time with the host's, kernels started, and for an op the least time at the device's measured rates."""
    timing = timings.get(candidate.name)
    if timing is None or not ON_GPU:
        return {}
    run = problem.runner(candidate)
    row = {"wall_us": 1e6 * _wall_seconds(run), "launches": _launches(run)}
    if isinstance(problem, StepProblem):
        torch.cuda.reset_peak_memory_stats()
        run()
        row["memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if isinstance(problem, OpProblem):
        bandwidth, rate = _rates(problem.dtype)
        row["floor_us"] = 1e6 * max(traffic(problem) / bandwidth, work(problem) / rate)
        row["floor_share"] = row["floor_us"] / (1e6 * timing.seconds.q50)
    return row


def traffic(problem: OpProblem) -> int:
    """Return the least bytes to move: x and factors in, y out; backward also grad and x in, dx and gradients out."""
    m, n = problem.case.widths
    factors = sum(layer[name].numel() for layer in problem.weights[0] for name in ("a", "b"))
    values = problem.tokens * (n + m) + factors
    if problem.backward:
        values += problem.tokens * (m + 2 * n) + 2 * factors
    return values * problem.dtype.itemsize


def work(problem: OpProblem) -> int:
    """Return the operations of the factored form."""
    return 2 * problem.tokens * problem.case.macs * (3 if problem.backward else 1)


@functools.cache
def _rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, operations a second of a large product."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    copy, product = (_clock().median(run, 0.1) for run in (lambda: target.copy_(source), lambda: left @ right))
    return 2 * source.numel() / copy, 2 * 8192**3 / product


def _wall_seconds(run: Callable[[], object], calls: int = 20) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _launches(run: Callable[[], object], calls: int = 3) -> int:
    """Kernels, copies and fills that a call starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return round(len(on_device) / calls)


def repeat(job: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Check each backend of each point against float64, then that ``times`` further calls give equal bits."""
    for described in job["points"]:
        point = Point(**described["point"])
        task = problem(point)
        for name in BACKENDS[1:]:
            say({"starting": f"{point.case} {point.direction} {point.input} {name}"})
            try:
                way = OPS[name](task)
                error = task.error(way)
            except (Missing, RuntimeError) as reason:  # no such backend here, or not for this call
                say({"skipped": f"{name}: {reason}", "op": task.case.op})
                continue
            run = task.runner(way)
            first = run()
            calls = (run() for _ in range(job["times"]))
            differing = sum(any(not torch.equal(*pair) for pair in zip(first, again, strict=True)) for again in calls)
            faults = [f"error {error:.1e}"] if not error <= task.tolerance(way) else []
            faults += [f"{differing} of {job['times']} results differ"] if differing else []
            say({"op": task.case.op, "name": f"{point.case} {name}", "fault": ", ".join(faults)})


def main(arguments: argparse.Namespace, deadline: float) -> int:
    """Prove, measure, tune; 0 when all is done and proved, 1 when something is wrong, 3 when the time was over."""
    if not ON_GPU and not arguments.quick:
        print("bench.run gpu: torch finds no CUDA device; --quick rehearses without one", file=sys.stderr)
        return 2
    if arguments.quick:
        os.environ |= {"TRITON_INTERPRET": "1", "KRON_KERNELS_BACKEND": "triton", "KRON_KERNELS_GPU_TESTS": "cpu"}
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if ON_GPU else "rehearsal"
    current = harness.stamp(arguments.threads, f"{device}, CUDA {torch.version.cuda}")
    file = harness.ResultFile(arguments.out / "gpu.csv", COLUMNS)
    seconds = arguments.seconds or SECONDS
    run = harness.Run(
        "gpu", sys.modules[__name__], file, current, arguments.threads, seconds, deadline, arguments.quick
    )
    record = steps.Record(arguments.out, current, deadline, arguments.quick)
    record.step("backends", 20, steps.backends)
    record.step("smoke", 90, lambda left: steps.smoke(record, run, left))
    todo = points(arguments.quick)
    head = [point for point in todo if point.input in TOKENS[:1] or point.case == "encoder"] or todo
    record.step("measure", 200, lambda left: _measure(run, head, left))
    record.step("tests", 240, lambda left: steps.tests(record, left))
    record.step("sanitizer", 100, lambda left: steps.sanitizer(record, left))
    record.step("tune", 80, lambda left: steps.tune(record, left))
    record.step("profiler", 60, lambda left: steps.profiler(record, left))
    record.step("measure the rest", float("inf"), lambda left: _measure(run, todo, left))
    for point in todo:
        op = ops.ALL_CASES[point.case].op if point.case != "encoder" else "encoder"
        for name in dict.fromkeys(name for group in groups(point) for name in group):
            if file.get(point, name, current):
                file.add(point, {"variant": name, "proof": record.proof(op)}, current)
    rows = [row for row in harness.read_rows(file.path) if row["machine"] == current["machine"]]
    if ON_GPU:
        choices = {op: steps.choices(rows, op) for op in steps.OPS if record.proof(op) == "ok"}
        text = json.dumps({call: entry for found in choices.values() for call, entry in found.items()}, indent=1)
        (arguments.out / "choices.json").write_text(text + "\n", encoding="utf-8")
    return record.exit_code()


def _measure(run: harness.Run, todo: list[Point], left: float) -> steps.Outcome:
    until, run.deadline = run.deadline, min(run.deadline, time.monotonic() + left)
    complete = run.points(todo)
    run.deadline = until
    return steps.Outcome("ok" if complete else "unfinished", f"{len(todo)} points")
