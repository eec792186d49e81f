"""Run folders: identity, checkpoints that are whole by their hashes, results; killed at any point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from kron_kernels.distill.run_folder import RunFolder, RunResult, mark_complete

CONFIG: dict[str, Any] = {"task": "sst2", "seed": 1, "training": {"learning_rate": 5e-5, "epochs": (1, 2)}}
RESULT = RunResult("task", "K8", "sst2", 1, 1000, 10, 2.5, metrics={"accuracy": 0.9}, score=90.0)


def save_checkpoint(run: RunFolder, step: int) -> Path:
    """What the Trainer writes, small, with the marker."""
    folder = run.checkpoints_path / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights at {step} " * 1000)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1 / step}]}))
    mark_complete(folder)
    return folder


def test_the_same_configuration_resumes_and_another_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run", CONFIG)
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
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run: expected a new folder or a run's, got .*holds other things"):
        RunFolder.create(tmp_path, CONFIG)


@pytest.mark.parametrize("damage", ["no marker", "torn marker", "flipped bit"])
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
    else:
        content = bytearray((newer / "model.safetensors").read_bytes())
        content[500] ^= 1
        (newer / "model.safetensors").write_bytes(content)
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
    (run.path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: damaged file"):
        run.result  # noqa: B018


@pytest.mark.slow
def test_another_process_is_kept_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    code = f"from kron_kernels.distill import RunFolder; RunFolder.create({str(run.path)!r}, {CONFIG!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert f"BlockingIOError: run: another process is at work in {run.path}" in done.stderr
