"""Interleaved timing, memory peaks, and the rule that what computes wrongly is not timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kron_kernels.testing import (
    PEAK,
    Quantiles,
    Variant,
    describe_machine,
    gemm_peak,
    gemm_peak_gflops,
    interleave,
    machine,
    peak_memory_growth,
)
from kron_kernels.testing.compare import compare
from kron_kernels.testing.layers import (
    A_FIRST,
    B_FIRST,
    CASES,
    DENSE,
    MATERIALISED,
    OURS,
    STOCK,
    LayerCase,
    LayerProblem,
)
from kron_kernels.testing.memory import process_bytes
from kron_kernels.testing.problem import TOLERANCE, Candidate

SMALL = LayerCase("small", (6, 4), (5, 3))


def test_quantiles_interpolate() -> None:
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0, 3.0)
    quantiles = Quantiles.of([float(value) for value in range(11)])
    assert dataclasses.astuple(quantiles) == pytest.approx((1.0, 5.0, 9.0))


class Clock:
    """Stands for the time module: only what a variant says it takes goes by."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("kron_kernels.testing.interleaving.time", clock)
    return clock


def test_speedup_is_over_the_baseline(clock: Clock) -> None:
    variants = [Variant("slow", lambda: clock.sleep(0.004)), Variant("fast", lambda: clock.sleep(0.001))]
    slow, fast = interleave(variants, "slow", seconds=0.1)
    assert (slow.name, fast.name) == ("slow", "fast")
    assert dataclasses.astuple(slow.speedup) == pytest.approx((1, 1, 1))
    assert dataclasses.astuple(fast.speedup) == pytest.approx((4, 4, 4))
    assert (slow.seconds.q50, fast.seconds.q50) == pytest.approx((0.004, 0.001))
    assert (slow.rounds, slow.calls, fast.calls) == (15, 30, 105)
    assert fast.columns("us") == pytest.approx(
        {
            "rounds": 15,
            "calls": 105,
            **{f"time_us_{name}": 1000 for name in ("q10", "q50", "q90")},
            **{f"speedup_{name}": 4 for name in ("q10", "q50", "q90")},
        }
    )


def test_the_ratio_is_taken_within_a_round(clock: Clock) -> None:
    # The machine slows down as it goes: each call takes longer than the one before, the baseline's too.
    variants = [Variant(name, lambda: clock.sleep(0.001 * (1 + clock.now))) for name in ("base", "same")]
    _, same = interleave(variants, "base", seconds=0.5)
    assert same.seconds.q90 > 1.3 * same.seconds.q10
    assert same.speedup.q50 == pytest.approx(1.0, abs=0.05)


def test_a_slow_variant_still_gets_its_rounds(clock: Clock) -> None:
    (timing,) = interleave([Variant("slow", lambda: clock.sleep(1.0))], "slow", seconds=0.3)
    assert (timing.rounds, timing.calls) == (5, 5)


def test_every_variant_has_its_turn_in_every_round() -> None:
    order: list[str] = []
    variants = [Variant(name, lambda name=name: order.append(name)) for name in "abc"]  # type: ignore[misc]
    timings = interleave(variants, "a", seconds=1e-9, warmup_seconds=1e-9, min_rounds=6, max_rounds=6)
    timed = order[-6 * 3 :]
    assert [timing.calls for timing in timings] == [6, 6, 6]
    assert [timed[start : start + 3] for start in (0, 3, 6)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_rest_is_not_timed(clock: Clock) -> None:
    variant = Variant("rests", lambda: clock.sleep(0.001), rest_seconds=0.01)
    (timing,) = interleave([variant], "rests", seconds=0.1)
    assert timing.seconds.q50 == pytest.approx(0.001)
    assert clock.now > 2 * 0.01 * timing.rounds


def test_interleave_refuses_bad_names() -> None:
    variant = Variant("a", lambda: None)
    with pytest.raises(ValueError, match=r"variants: names must differ, got \['a', 'a'\]"):
        interleave([variant, variant], "a")
    with pytest.raises(ValueError, match=r"baseline: expected one of \['a'\], got 'b'"):
        interleave([variant], "b")


def test_peak_memory_growth_sees_a_temporary() -> None:
    def run() -> torch.Tensor:
        return torch.ones(16 * 2**20).sum()

    run()
    growth = peak_memory_growth(run)
    if growth is None:
        pytest.skip("this system does not tell the peak")
    assert 60 * 2**20 < growth < 100 * 2**20


def test_process_memory_is_told_in_bytes() -> None:
    peak = process_bytes("VmHWM")
    assert 2**24 < process_bytes("VmRSS") <= peak
    with pytest.raises(OSError, match="has no VmNothing"):
        process_bytes("VmNothing")


def test_speedup_over_another_variant_is_taken_round_by_round(clock: Clock) -> None:
    # Every call takes longer than the one before: only within a round is the ratio what it is.
    took = {"base": 0.004, "other": 0.002, "mine": 0.001}
    variants = [
        Variant(name, lambda seconds=seconds: clock.sleep(seconds * (1 + clock.now))) for name, seconds in took.items()
    ]
    _, other, mine = interleave(variants, "base", seconds=0.2)
    assert mine.speedup_over(other).q50 == pytest.approx(2, rel=0.05)
    assert len(mine.turns) == mine.rounds
    with pytest.raises(ValueError):
        mine.speedup_over(dataclasses.replace(other, turns=other.turns[1:]))


def test_gemm_peak_is_one_call_of_known_size() -> None:
    peak = gemm_peak(torch.float32, size=16)
    assert (peak.variant.name, peak.flop, peak.label) == (PEAK, 2 * 16**3, "16x16, float32")
    assert peak.variant.run().shape == (16, 16)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("quicker", "label"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_bfloat16_peak_is_of_the_quicker_dtype(
    quicker: torch.dtype, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gemm_peak_gflops", lambda dtype, sizes: 2.0 if dtype is quicker else 1.0)
    gemm_peak.cache_clear()
    assert gemm_peak(torch.bfloat16, size=8).label == f"8x8, {label}"
    gemm_peak.cache_clear()


def test_machine_and_peak() -> None:
    machine = describe_machine()
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert gemm_peak_gflops(torch.float32, (64,), 2) > 0


def test_case_counts_the_cheaper_order() -> None:
    case = CASES["k21-attention"]
    assert case.shape == (768, 768)
    assert case.macs == 38_400
    assert case.saving == pytest.approx(15.36)
    assert str(case) == "384x48 (x) 2x16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("candidate", STOCK, ids=lambda candidate: candidate.name)
def test_every_stock_way_is_right(candidate: Candidate, backward: bool, dtype: torch.dtype) -> None:
    problem = LayerProblem(SMALL, 7, dtype, backward, copies=2)
    assert problem.error(candidate) <= TOLERANCE[dtype]
    run = problem.runner(candidate)
    first, second, third = run(), run(), run()
    pick = (lambda result: result[0]) if backward else (lambda result: result)
    assert torch.equal(pick(first), pick(third)), "the copies take turns"
    assert not torch.equal(pick(first), pick(second)), "the copies differ"


@pytest.mark.parametrize(
    ("right", "position"), [(B_FIRST, 0), (B_FIRST, 1), (B_FIRST, 2), (B_FIRST, 3), (DENSE, 1), (DENSE, 2)]
)
def test_a_wrong_gradient_shows(right: Candidate, position: int) -> None:
    class Damaged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return right.function(*inputs)

        @staticmethod
        def backward(ctx, grad):
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                gradients = list(torch.autograd.grad(right.function(*leaves), leaves, grad))
            gradients[position] = gradients[position] * 1.01
            return tuple(gradients)

    damaged = dataclasses.replace(right, function=Damaged.apply)
    assert LayerProblem(SMALL, 7, torch.float32, backward=True).error(damaged) > TOLERANCE[torch.float32]


def test_compare_times_only_what_is_right() -> None:
    def raises(*_):
        raise RuntimeError("no such kernel\nand a long story")

    wrong = dataclasses.replace(A_FIRST, name="wrong", function=lambda *args: A_FIRST.function(*args) * 1.001)
    lost = dataclasses.replace(A_FIRST, name="lost", function=lambda *args: A_FIRST.function(*args) * float("nan"))
    failing = dataclasses.replace(A_FIRST, name="failing", function=raises)
    started: list[str] = []
    results = compare(
        LayerProblem(SMALL, 7, torch.float32),
        [DENSE, wrong, lost, failing, OURS],
        seconds=0.01,
        starting=started.append,
    )
    by_name = {result.name: result for result in results}
    assert {name: result.status for name, result in by_name.items()} == {
        "dense": "ok",
        "wrong": "wrong",
        "lost": "wrong",
        "failing": "failed",
        "kron_kernels": "ok",
    }
    assert {name for name, result in by_name.items() if result.timing} == {"dense", "kron_kernels"}
    assert by_name["wrong"].reason == "relative error 1.0e-03 above 1e-05"
    assert by_name["failing"].reason == "RuntimeError: no such kernel"
    assert started == ["dense", "wrong", "lost", "failing", "kron_kernels", "timing"]


def test_compare_times_others_beside_in_the_same_rounds() -> None:
    peak = gemm_peak(torch.float32, size=16)
    results = compare(
        LayerProblem(SMALL, 7, torch.float32), [DENSE, OURS], seconds=0.01, beside=[peak.variant], over=[PEAK, "absent"]
    )
    assert [(result.name, result.status, result.error is None) for result in results] == [
        ("dense", "ok", False),
        ("kron_kernels", "ok", False),
        (PEAK, "ok", True),
    ]
    for result in results:
        assert result.timing is not None
        assert result.over == {PEAK: result.timing.speedup_over(results[-1].timing)}  # type: ignore[arg-type]


def test_compare_without_a_right_baseline_times_nothing() -> None:
    wrong = dataclasses.replace(DENSE, function=lambda *args: DENSE.function(*args) + 1)
    results = compare(LayerProblem(SMALL, 7, torch.float32), [wrong, OURS], seconds=0.01)
    assert [(result.status, result.timing) for result in results] == [("wrong", None), ("failed", None)]
    assert results[1].reason == "no dense baseline to compare with"


def test_compare_skips_forward_only_ways_of_backward() -> None:
    forward_only = dataclasses.replace(MATERIALISED, differentiates=None)
    problem = LayerProblem(SMALL, 7, torch.float32, backward=True)
    results = compare(problem, [DENSE, forward_only], seconds=0.01)
    assert (results[1].status, results[1].reason) == ("skipped", "forward only")
