"""Run folders: identity, checkpoints that are whole by their hashes, results; killed at any point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from kron_kernels.distill import run_folder
from kron_kernels.distill.run_folder import (
    RunFolder,
    RunResult,
    mark_complete,
    rows_fingerprint,
    weights_fingerprint,
)

CONFIG: dict[str, Any] = {"task": "sst2", "seed": 1, "training": {"learning_rate": 5e-5, "epochs": (1, 2)}}
RESULT = RunResult("task", "K8", "sst2", 1, 1000, 10, 2.5, metrics={"accuracy": 0.9}, score=90.0)


def save_checkpoint(run: RunFolder, step: int, complete: bool = True) -> Path:
    """What the Trainer writes, small; with the marker where ``complete``."""
    folder = run.checkpoints_path / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights at {step} " * 1000)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1 / step}]}))
    if complete:
        mark_complete(folder)
    return folder


def test_the_same_configuration_resumes_and_another_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run", CONFIG)
    assert run.config == {"task": "sst2", "seed": 1, "training": {"learning_rate": 5e-5, "epochs": [1, 2]}}
    assert (run.result, run.log, run.last_checkpoint()) == (None, [], None)
    RunFolder.create(run.path, CONFIG, resume=True)
    message = r"config: .*run holds a run with another config: seed: expected 1, got 2; training\.epochs: expected"
    with pytest.raises(ValueError, match=message):
        RunFolder.create(run.path, {"task": "sst2", "seed": 2, "training": {"learning_rate": 5e-5}})
    run.identify(data="abc")
    run.identify(data="abc", teacher="def")
    with pytest.raises(ValueError, match=r"data: .* holds a run with another data; choose another folder, or resume"):
        RunFolder(run.path).identify(data="other")
    with pytest.raises(FileExistsError, match=r"run: .*run exists; resume it, or choose another folder"):
        RunFolder.create(run.path, CONFIG, resume=False)
    with pytest.raises(FileNotFoundError, match=r"run: expected a run to resume, got .*absent"):
        RunFolder.create(tmp_path / "absent", CONFIG, resume=True)
    assert not (tmp_path / "absent").exists()


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    for path in (tmp_path, tmp_path / "precious"):
        with pytest.raises(FileExistsError, match=r"run: expected a new folder or a run's, got .*holds other things"):
            RunFolder.create(path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(FileNotFoundError, match=r"run: expected a run's folder, with run\.json, got"):
        RunFolder(tmp_path)
    # What a process leaves that was killed before the identity was whole.
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".run.json.tmp").write_text("{")
    run = RunFolder.create(tmp_path / "empty", CONFIG)
    RunFolder(run.path).discard()
    assert run.path.exists()
    run.discard()
    assert not run.path.exists()


@pytest.mark.parametrize("damage", ["no marker", "torn marker", "flipped bit", "missing file"])
def test_a_damaged_checkpoint_gives_way_to_the_older_whole_one(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    older, newer = save_checkpoint(run, 9), save_checkpoint(run, 10)
    assert run.last_checkpoint() == newer
    if damage == "no marker":
        (newer / "complete.json").unlink()
    elif damage == "torn marker":
        (newer / "complete.json").write_text('{"model.saf')
    elif damage == "flipped bit":
        content = bytearray((newer / "model.safetensors").read_bytes())
        content[500] ^= 1
        (newer / "model.safetensors").write_bytes(content)
    else:
        (newer / "model.safetensors").unlink()
    assert run.last_checkpoint() == older
    run.rewind()
    assert f"{newer} is damaged or was not written to its end: resuming from {older}" in caplog.text
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["checkpoint-9"]
    assert run.log == [{"step": 9, "loss": 1 / 9}]


def test_a_finished_run_has_its_result_and_log(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.finish(RESULT, [{"step": 1, "loss": 0.5, "grad_norm": float("nan")}])
    assert RunFolder.create(run.path, CONFIG).result == RESULT
    assert run.log == [{"step": 1, "loss": 0.5, "grad_norm": None}]
    document = json.loads((run.path / "result.json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    for change, message in (({"version": 2}, "version 1"), ({"kind": "x"}, "version 1"), ({"extra": 1}, "extra")):
        changed = {**document, "result": {**document["result"], **change}}
        (run.path / "result.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"result\.json: .*{message}"):
            run.result  # noqa: B018
    (run.path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: damaged file"):
        run.result  # noqa: B018


def test_fingerprints_tell_order_and_weights() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [0, 1]})
    assert rows_fingerprint(rows) == rows_fingerprint(rows.select([0, 1]))
    assert len({rows_fingerprint(rows.select(chosen)) for chosen in ([0, 1], [1, 0], [0])}) == 3
    model = torch.nn.Linear(2, 2)
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.bias[0] += 1e-6
    assert weights_fingerprint(model) != before


@pytest.mark.slow
def test_another_process_is_kept_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
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


def save_until_killed(path: Path) -> None:
    """Save and delete checkpoints without end, as the Trainer does: the oldest goes before the newest is marked."""
    run = RunFolder.create(path, CONFIG)
    run.rewind()
    last = run.last_checkpoint()
    step = int(last.name.split("-")[1]) if last else 0
    while True:
        step += 1
        newest = save_checkpoint(run, step, complete=False)
        for old in run._checkpoints()[:-2]:
            run_folder.shutil.rmtree(old)
        mark_complete(newest)


@pytest.mark.slow
def test_killed_processes_leave_a_folder_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at many points of saving and deleting: there is always a whole checkpoint, and never an older one."""
    # What a kill leaves does not depend on what is on the disk, and waiting for that takes most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, reached = tmp_path / "run", 0
    for kill in range(20):
        process = os.fork()
        if process == 0:
            try:
                save_until_killed(path)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.0037 * kill)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "it ended by itself"
        if (path / "run.json").exists() and (last := RunFolder(path).last_checkpoint()) is not None:
            step = int(last.name.split("-")[1])
            assert step >= reached
            assert (last / "model.safetensors").read_text() == f"weights at {step} " * 1000
            reached = step
    assert reached > 1
