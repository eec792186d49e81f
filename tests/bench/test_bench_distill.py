"""The benchmark of distilled models: its plan, and its runs by a command that only pretends to train."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the extra 'distill' is not installed")
pytest.importorskip("datasets", reason="the extra 'distill' is not installed")

from bench import distill
from bench.distill_curves import FILE, MOST_POINTS, curve_rows, plot_curves, write_curve_rows
from bench.distill_plan import ABLATED, FOLDERS, LEARNING_RATE, Job, Sources, plan
from bench.harness import read_rows
from kron_kernels.distill import DistillConfig, RunFolder, RunResult

SOURCES = Sources("bert", Path("glue"), ["wiki.txt"])
MORE = Sources("bert", Path("glue"), ["wiki.txt", "news.txt", "books.txt"])
# Leaves a finished run, or fails where there is no result for it; writes down what it was called with.
PRETENCE = """#!/bin/sh
[ "$1 $2 $3" = "-m kron_kernels.cli distill" ] && [ "$5" = --config ] && [ "$7" = --out ] || exit 3
name=$(basename "$8")
echo "$name $4 $OMP_NUM_THREADS $HF_HUB_OFFLINE" >> {folder}/calls
if [ ! -f "{folder}/$name.json" ]; then printf 'begun\\nkron-kernels distill: error: no such data\\n\\n' >&2; exit 2; fi
mkdir -p "$8"
cp "$6" "$8/config.yaml"
echo '{{"step": 1, "loss": 2.0}}' > "$8/metrics.jsonl"
cp "{folder}/$name.json" "$8/result.json"
"""


def jobs(
    *tasks: str,
    presets: tuple[str, ...] = ("K8", "K21", "K19"),
    seeds: int = 1,
    scale: float = 1.0,
    sources: Sources = SOURCES,
) -> list[Job]:
    return list(plan(sources, presets, tasks or list(FOLDERS), scale, seeds))


def result_of(job: Job) -> RunResult:
    """A made-up result of a job."""
    settings = job.settings
    taught = settings["stage"] == "task"
    return RunResult(
        kind=settings["stage"],
        name=settings.get("name") or settings["preset"],
        variant=settings.get("variant", ""),
        task=settings.get("task", "wiki.txt"),
        seed=settings.get("seed", 0),
        metrics={"accuracy": 75.0},
        score=None if settings["stage"] == "pretrain" else 75.0,
        teacher_score=80.0 if taught else None,
        parameters=1000,
        teacher_parameters=8000 if taught else None,
        steps=10,
        seconds=1.5,
        peak_memory_bytes=3 * 2**20,
        train_tokens=500,
    )


@pytest.fixture
def pretence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results by job, with a command in Python's place that finishes the runs which have one."""
    folder = tmp_path / "pretence"
    folder.mkdir()
    script = folder / "python"
    script.write_text(PRETENCE.format(folder=folder), encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(distill, "POLL_SECONDS", 0.01)
    return folder


def prepare(pretence: Path, prepared: list[Job]) -> None:
    for job in prepared:
        (pretence / f"{job.name}.json").write_text(json.dumps(result_of(job).to_dict()), encoding="utf-8")


def calls(pretence: Path) -> list[str]:
    path = pretence / "calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def options(tmp_path: Path, at_a_time: int = 1) -> argparse.Namespace:
    return argparse.Namespace(runs=tmp_path / "runs", jobs=at_a_time, threads=3)


def call_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float = 1.0) -> None:
    arguments = ["--model", "bert", "--glue", "glue", "--text", "wiki.txt", "--tasks", "mrpc", "--presets", "K8"]
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["distill", *arguments, *folders, "--minutes", str(minutes), "--jobs", "1"])
    distill.main()


@pytest.mark.parametrize("tasks", [(), ("mrpc",), ("sst2", "cola")])
@pytest.mark.parametrize("presets", [("K8", "K21", "K19"), ("K21",)])
@pytest.mark.parametrize(("seeds", "sources"), [(1, SOURCES), (3, MORE)])
def test_every_need_is_planned_before_and_every_job_is_a_run(
    tasks: tuple[str, ...], presets: tuple[str, ...], seeds: int, sources: Sources
) -> None:
    planned = jobs(*tasks, presets=presets, seeds=seeds, sources=sources)
    names: list[str] = []
    for job in planned:
        assert set(job.needs.values()) <= set(names), job.name
        names.append(job.name)
        config = DistillConfig.from_dict(job.config(Path("runs")))
        for field, need in job.needs.items():
            assert getattr(config, field) == str(Path("runs") / need / "model")
    assert len(set(names)) == len(names)
    # Rows of the table are told apart by these.
    keys = {(result.kind, result.label, result.task, result.seed) for result in map(result_of, planned)}
    assert len(keys) == len(planned)


def test_with_more_texts_a_longer_stage_1_goes_on_with_those_after_the_first() -> None:
    planned = {job.name: job for job in jobs("mrpc", presets=("K8",), sources=MORE)}
    assert planned["stage1-K8"].settings["data"] == ["wiki.txt"]
    assert planned["stage1-K8-longer"].settings["data"] == ["news.txt", "books.txt"]
    assert planned["stage1-K8-longer"].needs == {"student": "stage1-K8"}
    assert planned["K8-mrpc-stage-1-twice-as-long"].needs["student"] == "stage1-K8-longer"


def test_the_table_comes_before_the_ablations_and_those_before_more_seeds() -> None:
    planned = jobs(seeds=2)
    kinds = [
        "seed" if job.settings.get("seed") else "ablation" if job.settings.get("variant") else job.settings["stage"]
        for job in planned
    ]
    order = list(dict.fromkeys(kinds))
    assert order == ["finetune", "pretrain", "task", "ablation", "seed"]
    assert kinds.index("ablation") == len(FOLDERS) + 3 * (1 + len(FOLDERS))
    assert kinds.count("ablation") == 5 * 2 * len(ABLATED)
    assert kinds.count("seed") == 2 * len(ABLATED)
    assert {job.name.split("-")[0] for job, kind in zip(planned, kinds, strict=True) if kind == "ablation"} == {
        *("K8", "K21")
    }


def test_a_variant_that_names_a_rate_has_it() -> None:
    for job in jobs():
        rate = job.settings.get("variant", "").partition("rate ")[2]
        if job.settings["stage"] == "task":
            assert job.settings["learning_rate"] == float(rate or LEARNING_RATE)


def test_scale_stretches_the_passes_alone() -> None:
    for job, stretched in zip(jobs(), jobs(scale=0.5), strict=True):
        assert stretched.settings == {**job.settings, "epochs": 0.5 * job.settings["epochs"]}


def test_a_row_of_a_finished_run(tmp_path: Path) -> None:
    job = next(job for job in jobs() if job.name == "K8-cola")
    config = job.config(tmp_path)
    # Left to the paper, whose rate depends on preset and task.
    del config["learning_rate"]
    run = RunFolder.create(tmp_path / job.name, config)
    run.finish(result_of(job))
    row = distill.row_of(run.path, "BERT", {"commit": "abc", "threads": 1})
    assert set(row) <= {*distill.RUN_KEY, *distill.COLUMNS, "commit", "threads"}
    assert row.pop("metrics") == json.dumps({"accuracy": 75.0})
    assert row == {
        "model": "BERT",
        "kind": "task",
        "name": "K8",
        "variant": "",
        "task": "cola",
        "seed": 0,
        "score": 75.0,
        "teacher_score": 80.0,
        "kept": 93.75,
        "parameters": 1000,
        "teacher_parameters": 8000,
        "epochs": 6.0,
        "train_limit": None,
        "batch_size": 32,
        "learning_rate": 5e-5,
        "max_length": 128,
        "steps": 10,
        "train_tokens": 500,
        "seconds": 1.5,
        "peak_memory_mib": 3.0,
        "commit": "abc",
        "threads": 1,
    }
    teacher = next(job for job in jobs() if job.name == "teacher-sst2")
    run = RunFolder.create(tmp_path / teacher.name, teacher.config(tmp_path))
    run.finish(result_of(teacher))
    row = distill.row_of(run.path, "BERT", {})
    assert (row["kept"], row["train_limit"], row["learning_rate"]) == (None, 24_000, 1e-4)


class Pretended:
    """A process that is done when it is asked for the third time, or never."""

    returncode = 0

    def __init__(self, ended: Callable[[], object], endless: bool = False) -> None:
        self.killed = self.waited = False
        self._ended, self._endless, self._asked = ended, endless, 0

    def poll(self) -> int | None:
        self._asked += 1
        if self._endless or self._asked < 3:
            return None
        self._ended()
        return 0

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> None:
        self.waited = True


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_so_many_runs_at_a_time_and_none_before_its_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    running: set[str] = set()
    finished: set[str] = set()
    at_once: list[int] = []

    def start(job: Job, arguments: argparse.Namespace) -> Pretended:
        assert finished.issuperset(job.needs.values())
        running.add(job.name)
        at_once.append(len(running))
        return Pretended(lambda: (running.discard(job.name), finished.add(job.name)))

    monkeypatch.setattr(distill, "start", start)
    monkeypatch.setattr(distill, "POLL_SECONDS", 0)
    planned = jobs("mrpc", presets=("K8",))
    done, _ = distill.run_all(planned, options(tmp_path, at_a_time), math.inf)
    assert done == [job.name for job in planned]
    assert max(at_once) == at_a_time


def test_when_time_is_up_what_runs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[Pretended] = []

    def start(job: Job, arguments: argparse.Namespace) -> Pretended:
        processes.append(Pretended(lambda: None, endless=True))
        return processes[-1]

    monkeypatch.setattr(distill, "start", start)
    monkeypatch.setattr(distill, "POLL_SECONDS", 0.01)
    assert distill.run_all(jobs("mrpc"), options(tmp_path, 2), time.monotonic() + 0.1) == ([], None)
    assert [(process.killed, process.waited) for process in processes] == 2 * [(True, True)]


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_runs_are_done_in_order_once(tmp_path: Path, pretence: Path, at_a_time: int) -> None:
    planned = jobs("mrpc", presets=("K8",))
    prepare(pretence, planned)
    done, failure = distill.run_all(planned[:2], options(tmp_path, at_a_time), math.inf)
    assert (done, failure) == ([job.name for job in planned[:2]], None)
    done, failure = distill.run_all(planned, options(tmp_path, at_a_time), math.inf)
    assert (done, failure) == ([job.name for job in planned], None)
    called = calls(pretence)
    assert sorted(called) == sorted(job.name for job in planned)
    for job in planned:
        assert all(called.index(need) < called.index(job.name) for need in job.needs.values())
    if at_a_time == 1:
        assert called == [job.name for job in planned]
    # Stage, threads, and no network.
    assert "teacher-mrpc finetune 3 1" in (pretence / "calls").read_text().splitlines()


def test_a_failing_run_says_why_and_what_was_done_is_kept(
    tmp_path: Path, pretence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = jobs("mrpc", presets=("K8",))
    prepare(pretence, planned[:2])
    with pytest.raises(SystemExit, match=r"^K8-mrpc failed: kron-kernels distill: error: no such data$"):
        call_main(tmp_path, monkeypatch)
    assert calls(pretence) == ["teacher-mrpc", "stage1-K8", "K8-mrpc"]
    rows = read_rows(tmp_path / "results" / "distill.csv")
    assert [(row["kind"], row["score"]) for row in rows] == [("finetune", "75"), ("pretrain", "")]
    # Mended, it goes on after them.
    prepare(pretence, planned)
    call_main(tmp_path, monkeypatch)
    assert calls(pretence)[3:] == [job.name for job in planned[2:]]
    rows = read_rows(tmp_path / "results" / "distill.csv")
    assert [(row["name"], row["variant"], row["kept"]) for row in rows[2:]] == [
        ("K8", "", "93.75"),
        ("K8", "scores weigh 0.1", "93.75"),
        ("K8", "no stage 1", "93.75"),
        ("K8", "no stage 1, plain start", "93.75"),
        ("K8", "no stage 1, rate 1e-4", "93.75"),
        ("K8", "no KD in stage 2", ""),
    ]
    curves = read_rows(tmp_path / "results" / FILE)
    assert len(curves) == len(planned)
    assert {(row["series"], row["step"], row["value"]) for row in curves} == {("loss", "1", "2")}


def test_without_time_nothing_is_started(tmp_path: Path, pretence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(pretence, jobs("mrpc", presets=("K8",)))
    with pytest.raises(SystemExit, match=r"^0 of 8 runs are done; start again to go on$"):
        call_main(tmp_path, monkeypatch, minutes=0)
    assert calls(pretence) == []
    assert read_rows(tmp_path / "results" / "distill.csv") == []


def test_a_silent_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    done, failure = distill.run_all(jobs("mrpc")[:1], options(tmp_path), math.inf)
    assert (done, failure) == ([], "teacher-mrpc failed: it said nothing")


RUN: dict[str, Any] = {"model": "BERT", "kind": "task", "name": "K8", "variant": "", "task": "cola", "seed": 0}


def test_curves_are_thinned_and_take_the_place_of_older_ones(tmp_path: Path) -> None:
    steps = list(range(10, 10_010, 10))
    series: dict[str, Any] = {
        "loss": (steps, [1 / step for step in steps]),
        "eval/accuracy": ([5000, 10_000], [70.0, 71.0]),
        "learning_rate": (steps, [0.1] * 1000),
    }
    rows = list(curve_rows(RUN, series))
    loss = [row for row in rows if row["series"] == "loss"]
    assert len(loss) == MOST_POINTS
    assert (loss[0]["step"], loss[-1]["step"]) == (10, 10_000)
    gaps = {after["step"] - before["step"] for before, after in itertools.pairwise(loss)}
    assert max(gaps) - min(gaps) <= 10
    assert all(row["value"] == 1 / row["step"] for row in loss)
    assert [row["step"] for row in rows if row["series"] != "loss"] == [5000, 10_000]
    assert len(list(curve_rows(RUN, {"loss": ([3], [1.0])}))) == 1

    write_curve_rows(rows, tmp_path)
    write_curve_rows(curve_rows({**RUN, "seed": 1}, {"loss": ([1], [9.0])}), tmp_path)
    write_curve_rows(curve_rows(RUN, {"loss": ([1, 2], [4.0, 3.0])}), tmp_path)
    found = [(row["seed"], row["series"], row["step"], row["value"]) for row in read_rows(tmp_path / FILE)]
    assert found == [("1", "loss", "1", "9"), ("0", "loss", "1", "4"), ("0", "loss", "2", "3")]


def test_losses_are_drawn_by_task_and_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot_curves(tmp_path)
    assert not list(tmp_path.iterdir())
    series: dict[str, Any] = {"loss": ([1, 2], [4.0, 3.0]), "eval/accuracy": ([2], [70.0])}
    for changes in ({}, {"name": "K21"}, {"variant": "no stage 1"}, {"kind": "pretrain", "task": "wiki"}, {"seed": 1}):
        write_curve_rows(curve_rows({**RUN, **changes}, series), tmp_path)
    plot_curves(tmp_path)
    assert (tmp_path / "distill.png").read_bytes().startswith(b"\x89PNG")
    drawn: list[Any] = []
    monkeypatch.setattr("kron_kernels.distill.curves.write_overlay", lambda panels, path: drawn.append(panels))
    plot_curves(tmp_path)
    line = ([1, 2], [4.0, 3.0])
    assert drawn == [
        {"cola, stage 2": {"K8": line, "K21": line, "K8, no stage 1": line}, "wiki, stage 1": {"K8": line}}
    ]
