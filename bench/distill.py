"""Distil a real BERT on real tasks and write what was kept to distill.csv: one row a run.

python -m bench.distill --model DIR --glue DIR --text FILE [FILE ...] --minutes 80

Each run is a process of its own, of `kron-kernels distill`, with a folder under --runs. Cut off by --minutes or killed,
the next start goes on in the middle of the runs that were cut. The GLUE data is the user's own copy, a folder a task.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from bench.distill_curves import RUN_KEY, curve_rows, write_curve_rows
from bench.distill_plan import FOLDERS, Job, Sources, plan
from bench.harness import RESULTS, ResultFile, Row, stamp
from kron_kernels.cli.output import Progress
from kron_kernels.distill.config import DistillConfig
from kron_kernels.distill.curves import read_series
from kron_kernels.distill.run_folder import RunFolder

COLUMNS = (
    *("score", "teacher_score", "kept", "metrics", "parameters", "teacher_parameters", "steps", "train_tokens"),
    *("epochs", "train_limit", "batch_size", "learning_rate", "max_length", "seconds", "peak_memory_mib"),
)
POLL_SECONDS = 0.2


def main() -> None:
    arguments = parse()
    deadline = time.monotonic() + arguments.minutes * 60
    sources = Sources(str(arguments.model), arguments.glue, [str(path) for path in arguments.text])
    jobs = list(plan(sources, arguments.presets, arguments.tasks, arguments.scale, arguments.seeds))
    file = ResultFile(arguments.out / "distill.csv", RUN_KEY, COLUMNS)
    current = stamp(arguments.threads)
    done, failure = run_all(jobs, arguments, deadline)
    rows = {job: row_of(arguments.runs / job, arguments.name, current) for job in done}
    file.add(rows.values())
    runs = {job: read_series(RunFolder(arguments.runs / job)) for job in rows}
    write_curve_rows((row for job in rows for row in curve_rows(rows[job], runs[job])), arguments.out)
    if failure is not None:
        sys.exit(failure)
    if len(done) < len(jobs):
        sys.exit(f"{len(done)} of {len(jobs)} runs are done; start again to go on")


def run_all(jobs: list[Job], arguments: argparse.Namespace, deadline: float) -> tuple[list[str], str | None]:
    """Run what is not done, ``--jobs`` at a time, in order as far as needs allow.

    The names of all that are done, in order; and where a run failed, what it said last. No run is started after it.
    """
    done = {job.name for job in jobs if (arguments.runs / job.name / "result.json").is_file()}
    waiting = [job for job in jobs if job.name not in done]
    running: dict[str, subprocess.Popen[bytes]] = {}
    progress = Progress(every_seconds=0)
    failure = None
    try:
        while failure is None and (waiting or running) and time.monotonic() < deadline:
            for job in list(waiting):
                if len(running) < arguments.jobs and done.issuperset(job.needs.values()):
                    running[job.name] = start(job, arguments)
                    waiting.remove(job)
                    progress(len(done), len(jobs), f"running {', '.join(running)}")
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failure = f"{name} failed: {_last_line(arguments.runs / f'{name}.log')}"
                    else:
                        done.add(name)
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return [job.name for job in jobs if job.name in done], failure


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def start(job: Job, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The process of one run; what it prints goes to a file beside its folder."""
    config = arguments.runs / f"{job.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    settings = job.config(arguments.runs)
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "kron_kernels.cli", "distill", settings["stage"], "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    with open(arguments.runs / f"{job.name}.log", "ab") as log:
        return subprocess.Popen(
            [*command, "--out", str(arguments.runs / job.name)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def row_of(folder: Path, model: str, current: Row) -> Row:
    """A row of the table from a finished run."""
    run = RunFolder(folder)
    result: Any = run.result
    values = result.to_dict()
    # With the paper's numbers where the run was given none.
    config = DistillConfig.from_dict(run.config).resolved(result.name)
    kept = 100 * result.score / result.teacher_score if result.score and result.teacher_score else None
    return {
        **{name: values[name] for name in ("kind", "name", "variant", "task", "seed", "score", "teacher_score")},
        **{name: values[name] for name in ("parameters", "teacher_parameters", "steps", "train_tokens", "seconds")},
        "model": model,
        "kept": kept,
        "metrics": json.dumps(values["metrics"]),
        "peak_memory_mib": None if result.peak_memory_bytes is None else result.peak_memory_bytes / 2**20,
        **{name: getattr(config, name) for name in ("epochs", "train_limit", "batch_size", "learning_rate")},
        "max_length": config.max_length,
        **current,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of a dense BERT encoder")
    parser.add_argument("--name", help="of the model, in the results (the folder's)")
    parser.add_argument("--glue", type=Path, required=True, help=f"folder with {', '.join(FOLDERS.values())}")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text of stage 1")
    parser.add_argument("--tasks", nargs="+", default=list(FOLDERS), choices=list(FOLDERS), help="all")
    parser.add_argument("--presets", nargs="+", default=["K8", "K21", "K19"], help="the ablations take the first two")
    parser.add_argument("--scale", type=float, default=1.0, help="stretches the passes over the data (1)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of stage 2 on the small tasks (1)")
    parser.add_argument("--minutes", type=float, default=25.0, help="time budget (25)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (one a core)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (1)")
    parser.add_argument("--runs", type=Path, default=Path("build/distill"), help="folders of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of distill.csv")
    arguments = parser.parse_args()
    arguments.name = arguments.name or arguments.model.name
    return arguments


if __name__ == "__main__":
    main()
