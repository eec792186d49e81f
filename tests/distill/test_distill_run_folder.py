"""Run folders: starting, going on after a kill at any point, logging, checkpoints, curves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")
pytest.importorskip("matplotlib")
import transformers  # noqa: E402

from kron_kernels.compress import files  # noqa: E402
from kron_kernels.compress.files import check_space, write_text  # noqa: E402
from kron_kernels.distill import locks, run_folder  # noqa: E402
from kron_kernels.distill.callbacks import NonFiniteLossError, RunLogger, check_finite  # noqa: E402
from kron_kernels.distill.checkpoints import step_of  # noqa: E402
from kron_kernels.distill.curves import read_series, write_curves  # noqa: E402
from kron_kernels.distill.run_folder import RunFolder  # noqa: E402
from kron_kernels.distill.run_result import RunResult  # noqa: E402

CONFIG: dict[str, Any] = {"task": "sst2", "seed": 1, "training": {"learning_rate": 5e-5, "epochs": (1, 2)}}
RESULT = RunResult("task", "K8", "sst2", 1, 1000, 10, 2.5, metrics={"accuracy": 0.9}, score=90.0)
Usage = namedtuple("Usage", "total used free")


def save_checkpoint(run: RunFolder, step: int, complete: bool = True) -> Path:
    """What the Trainer writes, small; with the marker where ``complete``."""
    folder = run.checkpoints_path / f"checkpoint-{step}"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text(f"{name} at {step}")
    if complete:
        run.mark_complete(folder)
    return folder


def test_a_new_run_holds_its_configuration_and_environment(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run", CONFIG)
    assert yaml.safe_load(run.config_path.read_text()) == {
        "task": "sst2",
        "seed": 1,
        "training": {"learning_rate": 5e-5, "epochs": [1, 2]},
    }
    (start,) = json.loads((run.path / "environment.json").read_text())
    assert (start["torch"], start["transformers"]) == (torch.__version__, transformers.__version__)
    assert start["step"] == 0
    assert {"python", "kron_kernels", "cpu", "threads", "device"} <= start.keys()
    assert not run.finished
    assert run.last_checkpoint() is None
    assert run.metrics() == []


def test_the_same_configuration_resumes_and_another_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    save_checkpoint(run, 3)
    RunFolder.create(tmp_path / "run", CONFIG)
    starts = json.loads((run.path / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    other = {"task": "mrpc", "seed": True, "training": {"learning_rate": 1e-4}, "more": {"x": 1}}
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    with pytest.raises(ValueError) as error:
        RunFolder.create(tmp_path / "run", other)
    assert str(error.value) == (
        f"config: {run.path} holds a run with another one: task: expected 'sst2', got 'mrpc'; seed: expected 1, got "
        "True; training.learning_rate: expected 5e-05, got 0.0001 (and 2 more)"
    )
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    with pytest.raises(ValueError, match=r"another one: training\.epochs: expected \[1, 2\], got nothing$"):
        RunFolder.create(tmp_path / "run", {**CONFIG, "training": {"learning_rate": 5e-5}})


def test_resume_can_be_demanded_or_forbidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run: expected a run to resume, got .*run, which is none"):
        RunFolder.create(tmp_path / "run", CONFIG, resume=True)
    assert not (tmp_path / "run").exists()
    RunFolder.create(tmp_path / "run", CONFIG, resume=False)
    RunFolder.create(tmp_path / "run", CONFIG, resume=True)
    with pytest.raises(FileExistsError, match=r"run: .*run exists; resume it, or choose another folder"):
        RunFolder.create(tmp_path / "run", CONFIG, resume=False)


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    for path in (tmp_path, tmp_path / "precious"):
        with pytest.raises(FileExistsError, match=r"run: expected a new folder or a run's, got .*holds other things"):
            RunFolder.create(path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(FileNotFoundError, match=r"run: expected a run's folder, with config\.yaml, got"):
        RunFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    # What a process leaves that was killed before the configuration was whole.
    (tmp_path / "empty" / ".config.yaml.tmp").write_text("tas")
    (tmp_path / "empty" / ".lock").write_text("")
    assert RunFolder.create(tmp_path / "empty", CONFIG).config["task"] == "sst2"


def test_the_peak_memory_is_kept_over_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [5]
    monkeypatch.setattr(run_folder, "peak_memory", lambda: memory[0])
    run = RunFolder.create(tmp_path / "run", CONFIG)
    assert run.peak_memory_bytes == 5
    for memory[0] in (9, 8):
        run.note_memory()
    memory[0] = 3
    again = RunFolder.create(tmp_path / "run", CONFIG)
    memory[0] = 7
    again.note_memory()
    path = run.path / "environment.json"
    starts = json.loads(path.read_text())
    assert [start["peak_memory_bytes"] for start in starts] == [9, 7]
    assert again.peak_memory_bytes == 9
    # Begun by a version that did not note it.
    del starts[0]["peak_memory_bytes"]
    path.write_text(json.dumps(starts))
    assert again.peak_memory_bytes is None


def test_a_new_run_can_be_discarded_and_one_that_was_there_stays(tmp_path: Path) -> None:
    held = len(locks._HELD)
    run = RunFolder.create(tmp_path / "run", CONFIG)
    save_checkpoint(run, 3)
    RunFolder(run.path).discard()
    RunFolder.create(run.path, CONFIG).discard()
    assert run.last_checkpoint() is not None
    run.discard()
    assert not run.path.exists()
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", CONFIG).discard()
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
    assert not list((tmp_path / "empty").iterdir())
    assert len(locks._HELD) == held, "the locks are given up"


def test_configurations_must_be_plain(tmp_path: Path) -> None:
    for bad in ({"model": torch.nn.Linear(1, 1)}, {"rate": float("nan")}):
        with pytest.raises(TypeError, match="config: expected plain values, what JSON can hold: "):
            RunFolder.create(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.config_path.write_text("a: [1")
    with pytest.raises(ValueError, match=r"config\.yaml: expected YAML"):
        RunFolder.create(tmp_path / "run", CONFIG)
    run.config_path.write_text("- 1")
    with pytest.raises(ValueError, match=r"config\.yaml: expected values by name, got list"):
        run.config  # noqa: B018


def test_partial_checkpoints_are_passed_over_and_deleted_on_resume(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    whole = save_checkpoint(run, 9)
    save_checkpoint(run, 10, complete=False)
    truncated, lacking = save_checkpoint(run, 11), save_checkpoint(run, 12)
    (truncated / "model.safetensors").write_text("mod")
    (lacking / "optimizer.pt").unlink()
    (save_checkpoint(run, 13, complete=False) / "complete.json").write_text('{"step": 13, "fi')
    (run.checkpoints_path / "checkpoint-best").mkdir()
    assert run.last_checkpoint() == whole
    resumed = RunFolder.create(tmp_path / "run", CONFIG)
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["checkpoint-9", "checkpoint-best"]
    assert resumed.last_checkpoint() == whole


def test_a_checkpoint_whose_deletion_was_cut_short_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    older, newer = save_checkpoint(run, 5), save_checkpoint(run, 10)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.prune(1)
    # Every file but the marker is still there.
    assert (older / "model.safetensors").exists()
    assert run.complete_checkpoints() == [newer]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    paths = {step: save_checkpoint(run, step) for step in (2, 4, 10, 100)}
    run.prune(2, best=str(paths[2]))
    assert run.complete_checkpoints() == [paths[2], paths[10], paths[100]]
    run.prune(1)
    assert run.complete_checkpoints() == [paths[100]]
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        run.prune(0)


def test_metrics_are_lines_and_a_torn_last_one_is_dropped(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.log({"step": 1, "loss": torch.tensor(0.5), "loss/embedding": float("nan")})
    run.log({"step": 1, "eval/accuracy": 0.25})
    wanted = [{"step": 1, "loss": 0.5, "loss/embedding": None}, {"step": 1, "eval/accuracy": 0.25}]
    assert run.metrics() == wanted
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "loss": 0.')
    assert run.metrics() == wanted
    run.metrics_path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: expected a JSON object, got b'{\"ste'"):
        run.metrics()


def test_resuming_cuts_the_metrics_to_those_of_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    for step in range(1, 4):
        run.log({"step": step, "loss": 1 / step})
    save_checkpoint(run, 3)
    # Logged at the same step after the checkpoint, and so once more after the resumption.
    run.log({"step": 3, "train/runtime": 1.0})
    run.log({"step": 4, "loss": 0.1})
    save_checkpoint(run, 4, complete=False)
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "lo')
    RunFolder.create(tmp_path / "run", CONFIG)
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]
    assert run.metrics_path.read_text().endswith("}\n")
    save_checkpoint(run, 7)
    run.rewind(run.checkpoints_path / "checkpoint-3")
    assert run.last_checkpoint() == run.checkpoints_path / "checkpoint-3"
    with pytest.raises(ValueError, match=r"checkpoint: expected a complete one, got .*checkpoint-7"):
        run.rewind(run.checkpoints_path / "checkpoint-7")
    run.rewind(None)
    assert run.metrics() == []
    assert run.last_checkpoint() is None


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.log({"step": 1, "loss": 0.5})
    assert run.result is None
    run.finish(RESULT)
    again = RunFolder.create(tmp_path / "run", CONFIG)
    assert again.finished
    assert again.result == RESULT
    assert again.metrics() == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"version: expected a run's result of version 1, got 2"),
        ({"kind": "other"}, r"kind: expected one of finetune, pretrain, task, got 'other'"),
        ({"score": "high"}, r"score: expected float or nothing or int, got 'high'"),
        ({"seed": True}, r"seed: expected int, got True"),
        ({"seed": None}, r"seed: expected int, got None"),
        ({"extra": 1}, r"extra: expected one of the fields kind, name, "),
    ],
)
def test_results_are_checked_as_they_are_read(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    (run.path / "result.json").write_text(json.dumps({**RESULT.to_dict(), **change}))
    with pytest.raises(ValueError, match=rf"result\.json: {message}"):
        run.result  # noqa: B018


def test_results_that_lack_a_field_or_are_torn(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    data = RESULT.to_dict()
    del data["parameters"]
    (run.path / "result.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"result\.json: parameters: expected a value, got nothing"):
        run.result  # noqa: B018
    (run.path / "result.json").write_text("[")
    with pytest.raises(ValueError, match=r"result\.json: "):
        run.result  # noqa: B018


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    partial = save_checkpoint(run, 5, complete=False)
    code = f"""
from kron_kernels.distill.run_folder import RunFolder
try:
    RunFolder.create({str(run.path)!r}, {CONFIG!r})
except BlockingIOError as error:
    print(error)
"""
    root = Path(run_folder.__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout
    assert output == f"run: another process is at work in {run.path}\n"
    # What that process is writing is not taken for a leftover.
    assert partial.exists()


def test_a_full_disk_is_told_before_and_leaves_the_log_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 10**10 - 5 * 10**6, 5 * 10**6))
    check_space(tmp_path / "run" / "cache", 5 * 10**6, "cache")
    with pytest.raises(OSError, match=r"^cache: expected 2\.00 GB free at .*, got 5\.00 MB$") as error:
        check_space(tmp_path / "run" / "cache", 2 * 10**9, "cache")
    assert error.value.errno == errno.ENOSPC
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.log({"step": 1, "loss": 0.5})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.log({"step": 2, "loss": 0.25})
        with pytest.raises(OSError, match="No space left"):
            write_text(run.config_path, "half")
    run.log({"step": 3, "loss": 0.1})
    assert [record["step"] for record in run.metrics()] == [1, 3]
    assert run.config["task"] == "sst2"
    assert not list(run.path.glob(".*.tmp"))


def test_a_line_that_is_written_in_part_is_taken_back(tmp_path: Path) -> None:
    """A file-size limit lets a write through in part, as a full disk does."""
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.log({"step": 1, "loss": 0.5})
    size = run.metrics_path.stat().st_size
    code = f"""
import resource, signal
from kron_kernels.distill.run_folder import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 10}, resource.RLIM_INFINITY))
try:
    RunFolder({str(run.path)!r}).log({{"step": 2, "loss": 0.25}})
except OSError as error:
    print(error)
"""
    root = Path(run_folder.__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True).stdout
    assert output == f"{run.metrics_path}: the disk is full\n"
    assert run.metrics_path.stat().st_size == size


def test_curves_are_drawn(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    assert write_curves(run) is None
    for step in range(1, 5):
        run.log({"step": step, "epoch": 0.1, "loss": 10.0 / step, "loss/logits": 0.01, "grad_norm": None})
    run.log({"step": 4, "eval/accuracy": 0.5, "eval/runtime": 2.0})
    assert read_series(run) == {
        "loss": ([1, 2, 3, 4], [10.0, 5.0, 10.0 / 3, 2.5]),
        "loss/logits": ([1, 2, 3, 4], [0.01] * 4),
        "eval/accuracy": ([4], [0.5]),
        "eval/runtime": ([4], [2.0]),
    }
    assert write_curves(run) == run.path / "curves.png"
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in run.path.iterdir() if "curves" in path.name) == [".png"]


def test_losses_that_are_not_finite_stop_the_training(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    terms = {"embedding": torch.tensor(1.0), "scores": torch.tensor(2.0, dtype=torch.bfloat16)}
    check_finite({}, 1)
    check_finite(terms, 1, run)
    terms |= {"ffn": torch.tensor(float("inf")), "logits": torch.tensor(float("nan"))}
    with pytest.raises(
        RuntimeError, match=r"^step 7: expected finite losses, got inf for ffn; no checkpoint was saved"
    ):
        check_finite(terms, 7, run)
    last = save_checkpoint(run, 5)
    with pytest.raises(NonFiniteLossError, match=f"got inf for ffn; last complete checkpoint: {last}$"):
        check_finite(terms, 7, run)
    assert issubclass(NonFiniteLossError, FloatingPointError)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x)[:, 0] - labels).square().mean(), "logits": self.linear(x)}


def make_trainer(run: RunFolder, **arguments: Any) -> transformers.Trainer:
    generator = torch.Generator().manual_seed(0)
    data = [{"x": x, "labels": x.sum()} for x in torch.randn(32, 4, generator=generator)]
    defaults: dict[str, Any] = {
        "output_dir": str(run.checkpoints_path),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.Trainer(
        model=Model(),
        args=transformers.TrainingArguments(**{**defaults, **arguments}),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[RunLogger(run, keep=1)],
    )


class Stop(transformers.TrainerCallback):
    """Breaks off as a step begins, after some were logged past the last checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_a_resumed_training_logs_what_an_unbroken_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = RunFolder.create(tmp_path / "whole", CONFIG)
    make_trainer(whole).train()
    torch.manual_seed(0)
    run = RunFolder.create(tmp_path / "run", CONFIG)
    trainer = make_trainer(run)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert run.metrics()[-1]["step"] == 7
    resumed = RunFolder.create(tmp_path / "run", CONFIG)
    last = resumed.last_checkpoint()
    assert last == run.checkpoints_path / "checkpoint-6"
    before = resumed.metrics()[-1]["seconds"]
    make_trainer(resumed).train(resume_from_checkpoint=str(last))

    def losses(run: RunFolder) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in run.metrics() if "loss" in record]

    assert [step for step, _ in losses(whole)] == list(range(1, 13))
    assert losses(resumed) == losses(whole)
    evaluations = [record for record in resumed.metrics() if "eval/loss" in record]
    assert [record["step"] for record in evaluations] == [4, 8, 12]
    seconds = [record["seconds"] for record in resumed.metrics()]
    assert seconds == sorted(seconds)
    assert seconds[-1] > before
    assert "train/runtime" in resumed.metrics()[-1]
    assert [path.name for path in resumed.complete_checkpoints()] == ["checkpoint-12"]
    assert (resumed.path / "curves.png").exists()


def test_training_from_the_start_clears_what_was_there(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    save_checkpoint(run, 100)
    run.log({"step": 100, "loss": 9.0})
    make_trainer(run, max_steps=1, save_steps=1).train()
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-1"]
    assert {record["step"] for record in run.metrics()} == {1}


def test_a_trainer_that_does_not_fit_the_folder_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match=r"output_dir: expected the run's .*checkpoints, got .*elsewhere"):
        make_trainer(run, output_dir=str(tmp_path / "elsewhere")).train()
    with pytest.raises(ValueError, match="save_total_limit: expected None, the run keeps 1 itself, got 3"):
        make_trainer(run, save_total_limit=3).train()
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        RunLogger(run, keep=0)


def work_until_killed(path: Path) -> None:
    """Log, save and delete without end."""
    run = RunFolder.create(path, CONFIG)
    last = run.last_checkpoint()
    step = step_of(last) if last else 0
    while True:
        step += 1
        run.log({"step": step, "text": "x" * 2000})
        folder = run.checkpoints_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model", "optimizer", "state"):
            (folder / name).write_text(f"{step} " * 20000)
        run.mark_complete(folder)
        run.prune(1)


def kill_after(seconds: float, work: Callable[[], None]) -> None:
    """Run in a process of its own and send it SIGKILL."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"


def test_killed_processes_leave_a_folder_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at many points of logging, saving and deleting: what counts as complete is so, and nothing is lost."""
    path, reached = tmp_path / "run", 0
    # What a kill leaves does not hang on what is on the disk, and waiting for that is most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for kill in range(25):
        kill_after(0.03 + 0.0037 * kill, lambda: work_until_killed(path))
        if not (path / "config.yaml").exists():
            continue
        run = RunFolder(path)
        last = run.last_checkpoint()
        step = step_of(last) if last else 0
        assert step >= reached
        reached = step
        for name in ("model", "optimizer", "state") if last else ():
            assert (last / name).read_text() == f"{step} " * 20000
        assert [record["step"] for record in run.metrics()][:step] == list(range(1, step + 1))
    assert reached > 1


@pytest.mark.parametrize("where", ["sync", "replace"])
def test_text_is_there_whole_or_not_at_all(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files if where == "sync" else os, where, killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
