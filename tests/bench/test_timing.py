"""Interleaved timing, memory peaks, and the rule that what computes wrongly is not timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kron_kernels.testing import Variant, describe_machine, interleave, peak_memory_growth, timing
from kron_kernels.testing.problems import (
    Candidate,
    Case,
    Layer,
    OpProblem,
    a_first,
    b_first,
    dense_op,
    kron_op,
    relative_error,
)
from kron_kernels.testing.timing import Quantiles, compare

SMALL = Layer((6, 4), (5, 3))
CASES = {
    "one": Case("kron_matmul", (SMALL,)),
    "terms": Case("kron_matmul", (Layer((6, 4), (5, 3), 3),)),
    "ffn": Case("kron_ffn", (SMALL, Layer((3, 6), (4, 5)))),
    "qkv": Case("kron_qkv", (SMALL,) * 3),
}
FAST = 1e-3


def candidates(case: Case) -> list[Candidate]:
    mine = [Candidate("dense", dense_op(case.op), ("weight", "bias")), Candidate("kron_kernels", kron_op(case.op))]
    return [*mine, Candidate("b", b_first), Candidate("a", a_first)] if case.op == "kron_matmul" else mine


def test_quantiles_interpolate() -> None:
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0, 3.0)
    found = Quantiles.of([float(value) for value in range(11)])
    assert (found.q10, found.q50, found.q90) == (1.0, 5.0, 9.0)


def test_interleave_takes_turns_and_divides_within_a_round() -> None:
    order: list[str] = []
    variants = [Variant(name, lambda name=name: order.append(name)) for name in ("dense", "b")]

    def clock(run: Callable[[], object], calls: int) -> float:
        run()
        return {"dense": 6.0, "b": 2.0}[order[-1]]

    dense, other = interleave(variants, "dense", seconds=FAST, min_rounds=4, clock=clock)
    assert order[-8:] == ["dense", "b", "b", "dense", "dense", "b", "b", "dense"]
    assert (dense.speedup.q50, other.speedup.q50, other.seconds.q50, other.rounds) == (1.0, 3.0, 2.0, 4)


def test_interleave_checks_names() -> None:
    with pytest.raises(ValueError, match="expected different names with 'dense' among them"):
        interleave([Variant("a", int), Variant("a", int)], "dense")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_every_candidate_is_right_against_float64(case: str, backward: bool) -> None:
    problem = OpProblem(CASES[case], 7, torch.float32, backward, copies=2)
    for candidate in candidates(problem.case):
        assert problem.error(candidate) <= problem.tolerance(candidate)


def test_reference_is_the_dense_layer_of_the_factors() -> None:
    problem = OpProblem(CASES["terms"], 5, torch.float64)
    (layer,) = problem.weights[0]
    weight = sum(torch.kron(a, b) for a, b in zip(layer["a"], layer["b"], strict=True))
    (got,) = problem.runner(candidates(problem.case)[1])()
    assert relative_error(got, problem.x @ weight.T + layer["bias"]) < 1e-12


def test_a_wrong_output_or_gradient_is_not_timed() -> None:
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 1.001

    dense, right, *_ = candidates(CASES["one"])
    wrong = {
        "output": lambda x, *more: right.function(x, *more) * 1.001,
        "gradient": lambda x, *more: right.function(WrongGradient.apply(x), *more),
        "nan": lambda x, *more: right.function(x, *more) * float("nan"),
        "raises": lambda x, *more: right.function(x, *more, 1),
    }
    asked = [dense, *(dataclasses.replace(right, name=name, function=run) for name, run in wrong.items())]
    results = compare(OpProblem(CASES["one"], 5, torch.float32, True), asked, seconds=FAST)
    assert [(result.name, result.status) for result in results] == [
        *(("dense", "ok"), ("output", "wrong"), ("gradient", "wrong"), ("nan", "wrong"), ("raises", "failed")),
    ]
    assert [result.timing is None for result in results] == [False, True, True, True, True]
    timed = compare(OpProblem(CASES["one"], 5, torch.float32), asked[:2], seconds=FAST, time_wrong=True)
    assert (timed[1].status, timed[1].timing is None) == ("wrong", False)


def test_nothing_is_timed_without_a_right_baseline() -> None:
    (dense, right, *_) = candidates(CASES["one"])
    broken = dataclasses.replace(dense, function=lambda *operands: dense.function(*operands) + 1)
    results = compare(OpProblem(CASES["one"], 5, torch.float32), [broken, right], seconds=FAST)
    assert [(result.status, result.timing) for result in results] == [("failed", None), ("failed", None)]


def test_a_disturbed_timing_is_taken_again_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, asked = OpProblem(CASES["one"], 5, torch.float32), candidates(CASES["one"])[:1]
    one = Quantiles(1.0, 1.0, 1.0)
    calm, stalled = (timing.Timing("dense", seconds, one, 5) for seconds in (one, Quantiles(1.0, 2.0, 3.1)))
    for attempts, status in (([stalled, calm], "ok"), ([stalled] * 3, "noisy")):
        left = iter(attempts)
        monkeypatch.setattr(timing, "interleave", lambda *_, left=left, **__: [next(left)])
        (result,) = compare(problem, asked)
        assert (result.status, result.timing, list(left)) == (status, attempts[-1], [])
    assert result.reason == "quantiles differ by more than 3x"


def test_weights_take_turns() -> None:
    problem = OpProblem(CASES["one"], 5, torch.float32, copies=3)
    run = problem.runner(candidates(problem.case)[1])
    first = [run()[0] for _ in range(3)]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], run()[0])


def test_peak_memory_counts_what_a_call_holds() -> None:
    small, large = (peak_memory_growth(lambda size=size: torch.ones(size)) for size in (1000, 30_000_000))
    if small is None or large is None:
        pytest.skip("the system does not tell the peak of the resident set")
    assert large - small > 100_000_000


def test_describe_machine_names_what_a_figure_depends_on() -> None:
    assert {"cpu", "isa", "cores", "threads", "torch", "kron_kernels"} <= describe_machine().keys()
