"""The encoder benchmark: its plan, the other ways to a faster BERT, and runs of the scripts on tiny models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import encoder_candidates, model, model_worker, points, process_memory, profile
from bench.candidates import Missing
from bench.encoder_candidates import (
    DISTIL,
    INT8_TOLERANCE,
    INT8_TORCH,
    INT8_TORCHAO,
    ORT,
    Models,
    make_way,
    names,
    sweep_names,
)
from bench.harness import read_rows
from bench.model import REACH_SHAPES, SWEEP_SHAPES, plan, shape
from bench.profile import part_rows
from kron_kernels.testing.encoder import TOLERANCE, EncoderProblem, random_ids
from kron_kernels.testing.profile import PARTS

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def models() -> Models:
    return Models("fp32", {**SIZES, "num_hidden_layers": 2}, ["K8"])


@pytest.fixture(scope="module")
def problem(models: Models) -> EncoderProblem:
    return EncoderProblem(random_ids(models.dense, 3, 8))


def error_of(name: str, models: Models, problem: EncoderProblem) -> tuple[float, float]:
    try:
        way = make_way(name, models)
    except Missing as missing:
        pytest.skip(str(missing))
    assert way.name == name
    assert problem.runner(way)().shape == (3, 8, 32)  # type: ignore[attr-defined]
    return problem.error(way), way.tolerance


@pytest.mark.parametrize("name", ["dense", "K8", DISTIL, ORT])
def test_ways_are_right(name: str, models: Models, problem: EncoderProblem) -> None:
    error, tolerance = error_of(name, models, problem)
    assert error <= tolerance == TOLERANCE[torch.float32]


def test_int8_is_held_to_a_tolerance_of_its_own(models: Models, problem: EncoderProblem) -> None:
    error, tolerance = error_of(INT8_TORCH, models, problem)
    assert TOLERANCE[torch.float32] < error <= tolerance == INT8_TOLERANCE


@pytest.mark.compile
@pytest.mark.parametrize("name", ["K8, compiled", INT8_TORCHAO])
def test_compiled_ways_are_right(name: str, models: Models, problem: EncoderProblem) -> None:
    torch.compiler.reset()
    error, tolerance = error_of(name, models, problem)
    assert error <= tolerance


def test_half_the_layers_are_compared_with_themselves(models: Models) -> None:
    way = make_way(DISTIL, models)
    assert way.model is not models.dense
    assert len([module for module in way.model.modules() if isinstance(module, torch.nn.MultiheadAttention)]) == 0
    assert way.model.config.n_layers == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "reason"), [(INT8_TORCH, "float32 activations only"), (ORT, "float32 only")])
def test_what_has_no_bfloat16_says_so(name: str, reason: str) -> None:
    with pytest.raises(Missing, match=f"^{reason}$"):
        make_way(name, Models("bf16", {**SIZES, "num_hidden_layers": 1}, []))


@pytest.mark.parametrize(("name", "package"), [(ORT, "onnxruntime"), (INT8_TORCHAO, "torchao.quantization")])
def test_what_is_not_installed_is_missing(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Missing, match="not installed"):
        make_way(name, Models("fp32", {**SIZES, "num_hidden_layers": 1}, []))


def arguments(**changes: Any) -> argparse.Namespace:
    values = {"dtype": ["fp32", "bf16"], "preset": ["K8"], "shape": list(REACH_SHAPES), "layers": 12, "seconds": 2.0}
    return argparse.Namespace(**{**values, "compile": True, "reach": False, **changes})


def test_plan_starts_with_what_has_a_reach() -> None:
    jobs = list(plan(arguments()))
    assert [(job.points[0].dtype, len(job.points), job.seconds, job.memory) for job in jobs] == [
        ("fp32", len(REACH_SHAPES), 2.0, True),
        ("bf16", len(REACH_SHAPES), 2.0, True),
        ("fp32", len(SWEEP_SHAPES), 1.0, False),
        ("bf16", len(SWEEP_SHAPES), 1.0, False),
    ]
    assert jobs[0].candidates == names(["K8"])
    assert ORT in jobs[2].candidates
    assert ORT not in jobs[3].candidates
    assert "K8, compiled" not in sweep_names(["K8"], "fp32")
    assert [job.memory for job in plan(arguments(reach=True))] == [True, True]
    assert not any("compiled" in name for job in plan(arguments(compile=False)) for name in job.candidates)


def test_shapes_are_checked() -> None:
    assert shape("8x128") == (8, 128)
    for text in ("8", "8x", "0x4", "ax4"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected BATCHxSEQUENCE, got '{text}'"):
            shape(text)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that are function calls, on tiny models."""

    def child(module: str, job: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
        assert module == "bench.model_worker"
        messages: list[dict[str, Any]] = []
        kinds = {
            "time": model_worker.time_points,
            "memory": model_worker.memory_points,
            "profile": model_worker.profile_points,
        }
        kinds[job["kind"]]({**job, "sizes": SIZES}, messages.append)
        yield from messages

    monkeypatch.setattr(points, "child", child)
    monkeypatch.setattr(profile, "child", child)


@pytest.mark.usefixtures("in_process")
def test_model_script_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_worker, "COMPILED_DENSE", "K8")  # stands in for what takes long to compile
    options = ["--shape", "2x8", "--layers", "2", "--dtype", "fp32", "--seconds", "0.01", "--preset", "K8"]
    monkeypatch.setattr("sys.argv", ["model", "--reach", "--no-compile", *options, "--out", str(tmp_path)])
    model.main()
    rows = {row["model"]: row for row in read_rows(tmp_path / "model.csv")}
    assert set(rows) == {name for name in names(["K8"]) if "compiled" not in name}
    assert {rows[name]["status"] for name in ("dense", "K8", DISTIL)} == {"ok"}
    assert (rows["dense"]["speedup_q50"], rows["K8"]["over_compiled_q50"]) == ("1", "1")
    assert float(rows["dense"]["over_compiled_q50"]) > 0
    assert float(rows["K8"]["parameters"]) < float(rows["dense"]["parameters"])
    written = (tmp_path / "model.csv").stat().st_mtime_ns
    model.main()
    assert (tmp_path / "model.csv").stat().st_mtime_ns == written, "measured already"


@pytest.mark.usefixtures("in_process")
def test_profile_script_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--shape", "2x8", "--layers", "1", "--dtype", "fp32", "--seconds", "0.01", "--preset", "K8"]
    monkeypatch.setattr("sys.argv", ["profile", *options, "--out", str(tmp_path)])
    profile.main()
    rows = read_rows(tmp_path / "profile.csv")
    assert [(row["model"], row["part"]) for row in rows] == [(name, part) for name in ("dense", "K8") for part in PARTS]
    written = (tmp_path / "profile.csv").stat().st_mtime_ns
    profile.main()
    assert (tmp_path / "profile.csv").stat().st_mtime_ns == written, "measured already"


def test_part_rows_share_the_sum() -> None:
    rows = part_rows(
        {"variant": "K8", "parts": {"FFN": 0.003, "QKV": 0.001}, "traced": 0.0041, "untraced": 0.004, "gap": 0}
    )
    assert [(row["part"], row["time_ms"], row["share"]) for row in rows] == [
        ("FFN", pytest.approx(3), pytest.approx(0.75)),
        ("QKV", pytest.approx(1), pytest.approx(0.25)),
    ]
    assert rows[0]["sum_ms"] == rows[0]["untraced_ms"] == pytest.approx(4)


def test_process_memory_is_of_a_fresh_process() -> None:
    sizes = {**SIZES, "intermediate_size": 200_000}  # weights of 49 MiB
    told = argparse.Namespace(threads=1, sizes=sizes)
    key = {"dtype": "fp32", "batch": 1, "sequence": 8, "layers": 1, "model": "dense"}
    row = process_memory.measure_process(key, told)
    assert row["status"] == "ok", row
    assert 48 < row["checkpoint_mib"] < 55
    assert row["imported_mib"] > 50
    # The checkpoint is mapped, and these weights are read.
    assert row["model_mib"] == row["peak_mib"] - row["imported_mib"] > 48


def test_process_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--preset", "K99", "--layers", "1", "--dtype", "fp32", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["process_memory", *options])
    monkeypatch.setattr(process_memory, "child", lambda module, job, environment: iter(_die(job)))
    process_memory.main()
    rows = {row["model"]: (row["status"], row["reason"]) for row in read_rows(tmp_path / "process.csv")}
    crashed = ("crashed", "exit code 1")
    assert rows == {"dense": ("ok", ""), "K99": crashed, "K99, package": crashed, "K99, folder": crashed}


def test_a_package_is_exported_and_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(process_memory, "child", lambda module, job, environment: (jobs.append(job), _die(job))[1])
    key = {"dtype": "bf16", "batch": 1, "sequence": 8, "layers": 1, "model": "K8, package"}
    row = process_memory.measure_process(key, argparse.Namespace(threads=1, sizes={}))
    assert row["status"] == "ok"
    assert [(job["kind"], job["model"]) for job in jobs] == [("save", "K8"), ("export", "K8"), ("run package", "K8")]


def _die(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if job["model"] == "K99":
        raise process_memory.Crash("exit code 1", "start")
    yield {"saved": job["folder"]} if job["kind"] == "save" else {"imported": 2**20, "peak": 2**21}


def test_peers_apart_are_not_seen_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchao" / "quantization").mkdir(parents=True)
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao" / "quantization" / "__init__.py").write_text(
        "Int8DynamicActivationInt8WeightConfig = dict\ndef quantize_(model, config): model.seen = config\n"
    )
    monkeypatch.setattr(encoder_candidates, "APART", tmp_path)
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = list(sys.path)
    models = Models("fp32", {**SIZES, "num_hidden_layers": 1}, [])
    assert models.int8_torchao.seen == {}
    assert sys.path == before
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.delitem(sys.modules, name)
