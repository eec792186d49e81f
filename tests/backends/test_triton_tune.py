"""The search for tiles, with the machine's answers made up: what is tried, kept, written and resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kron_kernels.backends.triton.offline import Report
from kron_kernels.backends.triton.ops import IMPLEMENTATIONS
from kron_kernels.backends.triton.problems import LAYERS, Layer, Problem, problems, run
from kron_kernels.backends.triton.search import Tools, blocks_around, launches_with, look_ups, search

from kron_kernels.backends.triton import configs, tune
from kron_kernels.backends.triton.launch import INTERPRETED, Device, Launch, recording

GOOD = Report(registers=128, stack=0, shared=4096, wgmma=8, mma=0, local=0, stores={16: 8})
HOPPER = Device(90, 132, 227 * 1024)
PROBLEM = Problem("k8-w2", "kron_matmul", "bf16", 4096)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path))
    configs.reload()
    yield tmp_path
    configs.reload()


def starter(problem: Problem = PROBLEM, device: str = "meta") -> Callable[[], object]:
    operands = problem.operands(device)
    return lambda: run(problem, operands, IMPLEMENTATIONS)


def constant(launch: Launch, name: str) -> int:
    return launch.constants[launch.kernel.arg_names.index(name) - len(launch.arguments)]


def machine(
    seconds: Callable[[Launch], float],
    report: Callable[[Launch], Report | RuntimeError] = lambda _launch: GOOD,
    wrong: Callable[[], str] = lambda: "",
) -> Tools:
    return Tools(
        HOPPER,
        lambda launches: [report(launch) for launch in launches],
        lambda launches: sum(map(seconds, launches)),
        wrong,
    )


def test_every_look_up_is_of_launches_that_it_changes() -> None:
    """Of all problems: other warps for a class change launches of the op, and nothing but their options.

    Where a class is a choice between kernels, another choice changes which are launched.
    """
    for problem in problems(IMPLEMENTATIONS, dtypes=["bf16"], tokens=[4096]):
        start = starter(problem)
        for look_up in look_ups(start, HOPPER):
            default = look_up.default._asdict()
            before = launches_with(look_up, default, start, HOPPER)
            if "kernels" in default:
                other = launches_with(look_up, {"kernels": 3 - default["kernels"]}, start, HOPPER)
                assert {one.kernel for one in before} != {one.kernel for one in other}
                continue
            after = launches_with(look_up, {**default, "num_warps": 2 * default["num_warps"]}, start, HOPPER)
            changed = [(one, other) for one, other in zip(before, after, strict=True) if one.options != other.options]
            assert changed, look_up
            for one, other in changed:
                assert one.options.num_warps == default["num_warps"]
                assert other.options.num_warps == 2 * default["num_warps"]
            assert [one[0] for one in before] == [other[0] for other in after]


def test_the_fastest_of_what_compiles_well_is_kept() -> None:
    start = starter()
    (look_up,) = look_ups(start, HOPPER)
    tried = []

    def report(launch: Launch) -> Report | RuntimeError:
        if constant(launch, "BN") == 256:
            return GOOD._replace(stack=8)
        if constant(launch, "BT") == 128:
            return GOOD._replace(shared=HOPPER.shared + 1)
        return RuntimeError("does not compile") if constant(launch, "BK") == 64 else GOOD

    def seconds(launch: Launch) -> float:
        tried.append(launch)
        if launch.options.num_stages == 4:
            raise RuntimeError("out of resources")
        speed = constant(launch, "BT") * constant(launch, "BN") * constant(launch, "BK")
        return 1e-3 / speed / launch.options.num_stages / launch.options.num_warps

    entry = search(look_up, start, machine(seconds, report))
    assert entry is not None
    assert entry.tiles == {"tokens": 64, "columns": 128, "depth": 32, "num_warps": 8, "num_stages": 3}
    assert entry.us == pytest.approx(1e3 / (64 * 128 * 32) / 3 / 8)
    assert entry.default_us is not None
    assert entry.us <= entry.default_us
    keys = [(launch.constants, launch.options) for launch in tried]
    assert len(set(keys)) == len(keys) < 60


def test_tiles_that_compute_wrongly_are_passed_over() -> None:
    start = starter()
    (look_up,) = look_ups(start, HOPPER)
    answers = iter(["wrong", "wrong", ""])
    sorted_seconds = machine(lambda launch: float(constant(launch, "BT") * 1000 + launch.options.num_stages))
    entry = search(look_up, start, sorted_seconds._replace(wrong=lambda: next(answers)))
    fastest = search(look_up, start, sorted_seconds)
    assert entry is not None
    assert fastest is not None
    assert entry.tiles != fastest.tiles
    assert next(answers, None) is None
    assert search(look_up, start, sorted_seconds._replace(wrong=lambda: "wrong")) is None
    assert search(look_up, start, machine(lambda _launch: 1.0, lambda _launch: RuntimeError("no"))) is None


def test_tiles_in_force_while_judged_are_the_candidate() -> None:
    start = starter()
    (look_up,) = look_ups(start, HOPPER)
    seen = []

    def wrong() -> str:
        seen.append(dict(configs._overrides[look_up.key]))
        return ""

    entry = search(look_up, start, machine(lambda launch: float(constant(launch, "BT"))))
    assert entry is not None
    search(look_up, start, machine(lambda launch: float(constant(launch, "BT")), wrong=wrong))
    assert seen == [entry.tiles]


def test_blocks_stay_within_bounds() -> None:
    tried = list(blocks_around({"tokens": 16, "columns": 256, "num_warps": 4, "num_stages": 3}))
    assert {(tiles["tokens"], tiles["columns"]) for tiles in tried} == {(16, 128), (16, 256), (32, 128), (32, 256)}
    assert {tiles["tokens"] for tiles in blocks_around({"tokens": 1, "num_warps": 4})} == {1, 2}
    assert all(tiles["num_warps"] == 4 for tiles in tried)
    assert [tiles["kernels"] for tiles in blocks_around({"kernels": 2, "num_warps": 4})] == [1, 2]


def test_launches_that_tiles_leave_alone_are_not_asked_about() -> None:
    """A faulty kernel beside the one that is tuned keeps the default from being timed, and no other tiles."""
    start = starter(Problem("k8-w2", "kron_matmul_backward", "bf16", 4096))
    look_up = next(one for one in look_ups(start, HOPPER) if one.key.startswith("large_gradient_kernel"))

    def report(launch: Launch) -> Report:
        return GOOD._replace(stack=8 if launch.kernel.fn.__name__ == "mm_kernel" else 0)

    entry = search(look_up, start, machine(lambda launch: float(launch.options.num_stages), report))
    assert entry is not None
    assert entry.default_us is None


def tools_of(seconds: Callable[[Launch], float]) -> Callable[[Problem, Sequence[Any]], Tools]:
    return lambda _problem, _operands: machine(seconds)


def test_a_run_writes_every_class_and_resumes(folder: Path) -> None:
    wanted = [PROBLEM, Problem("k8-w2", "kron_matmul_backward", "bf16", 4096)]
    measured_on = {"device": "made up", "triton": "1"}
    file = tune.TunedFile(folder, "sm_90", measured_on)
    assert not tune.tune(wanted, "meta", tools_of(lambda _launch: 1.0), file, time.monotonic() - 1)
    assert not file.path.exists()
    assert tune.tune(wanted, "meta", tools_of(lambda _launch: 1.0), file)
    data = json.loads(file.path.read_text())
    assert data["device"] == "made up"
    assert len(data["entries"]) == len(set(data["entries"])) >= 3
    (forward,) = look_ups(starter(), HOPPER)
    assert forward.key in data["entries"]

    def fail(_launch: Launch) -> float:
        raise AssertionError("measured again")

    again = tune.TunedFile(folder, "sm_90", measured_on)
    assert tune.tune(wanted, "meta", tools_of(fail), again)
    # Another device: all is measured again, and what was there stays until then.
    other = tune.TunedFile(folder, "sm_90", {**measured_on, "device": "another"})
    assert set(other.entries) == set(data["entries"])
    assert tune.tune(wanted[:1], "meta", tools_of(lambda _launch: 2.0), other)
    after = json.loads(file.path.read_text())
    assert after["device"] == "another"
    assert after["entries"][forward.key]["us"] == 2e6
    assert set(after["entries"]) == set(data["entries"])


def test_calls_take_what_was_written(folder: Path) -> None:
    start = starter()
    (look_up,) = look_ups(start, HOPPER)
    fast = {"tokens": 32, "columns": 64, "depth": 16, "num_warps": 4, "num_stages": 4}
    tune.TunedFile(folder, "sm_90", {}).add(look_up.key, configs.Entry(fast, 1.0, 2.0))
    configs.reload()
    assert look_ups(start, HOPPER) == [look_up]
    with recording(HOPPER) as launches:
        start()
    assert [constant(launches[0], name) for name in ("BT", "BN", "BK")] == [32, 64, 16]
    assert tuple(launches[0].options) == (4, 4)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: tests/gpu tunes on it")
@pytest.mark.parametrize("op", ["kron_matmul", "kron_matmul_backward"])
def test_the_judge(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "tiny", Layer((16, 16), (2, 2)))
    problem = Problem("tiny", op, "fp32", 20)
    operands = problem.operands("cpu")
    wrong = tune.judge(problem, operands)
    assert wrong() == ""
    right = IMPLEMENTATIONS[op]

    def slightly_off(*arguments: object) -> object:
        results = right(*arguments)
        for result in (results,) if isinstance(results, torch.Tensor) else results:
            result.view(-1)[-1:] += 1e-3
        return results

    monkeypatch.setitem(IMPLEMENTATIONS, op, slightly_off)
    assert wrong().startswith("result 0: error 1.00e-03, allowed ")


def test_shapes_in_words() -> None:
    assert Layer.parse("384x768,2x4,4") == Layer((384, 768), (2, 4), 4)
    assert Layer.parse("384x384,2x2") == Layer((384, 384), (2, 2))
    for text in ("384x384", "384x384,2x0", "1x1,1x1,0", "axb,1x1"):
        with pytest.raises(ValueError, match="shape: expected m1xn1,m2xn2 or m1xn1,m2xn2,terms, got '"):
            Layer.parse(text)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.parse(["--shape", "3"])
    assert "shape: expected m1xn1,m2xn2" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tune.main(["--name", "k8-w2"]) == 2
        assert capsys.readouterr().err == "tune: error: torch finds no CUDA device to measure on\n"
    assert tune.parse(["--shape", "8x8,2x2"]).names == ("8x8,2x2",)
    del LAYERS["8x8,2x2"]
    assert tune.parse([]).names == tune.NAMES
