"""The folder of one run of distillation: what it was asked, how it went, where it can go on, and what it came to."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..compress.files import NoSpaceError, write_text
from . import checkpoints, locks
from .environment import describe_environment, peak_memory
from .run_result import RunResult

_LOG = logging.getLogger(__name__)
_LOCK = ".lock"
_PEAK = "peak_memory_bytes"  # of a start
_MISSING = object()


class RunFolder:
    """One run of training on disk.

    | entry | what |
    | --- | --- |
    | ``config.yaml`` | the run's configuration |
    | ``environment.json`` | a list with, for each start, the machine, the versions, the step and the peak memory |
    | ``metrics.jsonl`` | a JSON object a line: ``step``, ``epoch``, ``seconds`` and losses or ``eval/...`` metrics |
    | ``curves.png`` | the same, drawn (``curves.write_curves``) |
    | ``checkpoints/checkpoint-N`` | transformers' checkpoints |
    | ``start`` | the student as it was made, where the run made it |
    | ``model`` | the final model with its tokenizer |
    | ``result.json`` | the :class:`RunResult`; a run that has one is finished |

    A process may be killed at any point, in the middle of a write too. A checkpoint counts only with a marker, which is
    written after everything else in it is on the disk, holds the sizes of its files, and is removed first when the
    checkpoint is deleted. transformers' own rotation deletes the last checkpoint before the marker of the next is
    there, and without regard to the marker: leave ``save_total_limit`` unset and call :meth:`prune`, as
    :class:`~kron_kernels.distill.callbacks.RunLogger` does.

    ``RunFolder(path)`` reads a run, of whatever state; :meth:`create` starts one or goes on with it.

    Raises:
        FileNotFoundError: ``path`` is not a run's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: locks.Lock | None = None  # of a run that create began
        self._has_new_folder = False
        if not self.config_path.is_file():
            raise FileNotFoundError(f"run: expected a run's folder, with config.yaml, got {self.path}")

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], resume: bool | None = None) -> RunFolder:
        """Start a run, or go on with one of the same configuration.

        A run to go on with is put back to its last complete checkpoint (see :meth:`rewind`), unless it is finished.
        The folder is this process's own until the process ends.

        Args:
            path: folder; its parents are made.
            config: plain values (what JSON can hold) by name, nested as one likes.
            resume: True asks for an existing run, False for a new one, None takes either.

        Raises:
            ValueError: the run there has another configuration; the message names what differs.
            TypeError: ``config`` holds something that is not plain.
            FileExistsError: a file, a folder of something else, or, where ``resume`` is False, a run.
            FileNotFoundError: no run where ``resume`` is True.
            BlockingIOError: another process is at work in the folder.
        """
        path, plain = Path(path), _plain(config)
        if not (path / "config.yaml").is_file():
            if path.exists() and not (path.is_dir() and all(_is_ours(entry) for entry in path.iterdir())):
                raise FileExistsError(f"run: expected a new folder or a run's, got {path}, which holds other things")
            if resume:
                raise FileNotFoundError(f"run: expected a run to resume, got {path}, which is none")
            existed = path.is_dir()
            path.mkdir(parents=True, exist_ok=True)
            lock = locks.acquire(path / _LOCK)
            write_text(path / "config.yaml", _to_yaml(plain))
            run = cls(path)
            run._lock, run._has_new_folder = lock, not existed
            return run._start()
        if resume is False:
            raise FileExistsError(f"run: {path} exists; resume it, or choose another folder")
        run = cls(path)
        differing = list(_differences(run.config, plain))
        if differing:
            more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
            raise ValueError(f"config: {path} holds a run with another one: {'; '.join(differing[:3])}{more}")
        locks.acquire(path / _LOCK)
        return run._start()

    def _start(self) -> RunFolder:
        if self.finished:
            return self
        self.checkpoints_path.mkdir(exist_ok=True)
        last = self.last_checkpoint()
        self.rewind(last)
        step = 0 if last is None else checkpoints.step_of(last)
        self._write_starts([*self._starts(), {**describe_environment(), "step": step, _PEAK: peak_memory()}])
        return self

    def note_memory(self) -> None:
        """Keep the peak memory of this process, where it has grown, as that of the last start."""
        starts = self._starts()
        if (peak := peak_memory()) > starts[-1][_PEAK]:
            starts[-1][_PEAK] = peak
            self._write_starts(starts)

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest peak of all starts, as far as it was noted; None where one of them has none."""
        starts = self._starts()
        if not all(_PEAK in start for start in starts):
            return None
        return max((start[_PEAK] for start in starts), default=None)

    def _starts(self) -> list[dict[str, Any]]:
        path = self.path / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def _write_starts(self, starts: list[dict[str, Any]]) -> None:
        write_text(self.path / "environment.json", json.dumps(starts, indent=2) + "\n")

    def discard(self) -> None:
        """Delete the run where ``create`` began it here, with the folder unless that was there before; else nothing."""
        if self._lock is None:
            return
        # The configuration last: killed in between, it is a run still.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry == self.config_path):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if self._has_new_folder:
            self.path.rmdir()
        # Not before: another process may have the place from here on.
        locks.release(self._lock)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints_path(self) -> Path:
        """The ``output_dir`` of transformers' TrainingArguments."""
        return self.path / "checkpoints"

    @property
    def start_path(self) -> Path:
        return self.path / "start"

    @property
    def model_path(self) -> Path:
        """The final model; written in ``_files.new_folder(run.model_path)`` it is there whole or not at all."""
        return self.path / "model"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration; ValueError for a damaged file."""
        import yaml

        try:
            config = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{self.config_path}: expected YAML: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{self.config_path}: expected values by name, got {type(config).__name__}")
        return config

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def result(self) -> RunResult | None:
        """What the run came to, None before its end; ValueError for a damaged file."""
        path = self.path / "result.json"
        if not path.is_file():
            return None
        try:
            return RunResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def finish(self, result: RunResult) -> None:
        """Write ``result.json``: the last thing a run does."""
        write_text(self.path / "result.json", json.dumps(_finite(result.to_dict()), indent=2, allow_nan=False) + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line of metrics and wait until it is on the disk; what is not finite becomes null.

        Raises:
            OSError: it could not be written; the file ends as before.
        """
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        # Unbuffered, so that a line which does not fit is not tried again as the file is closed.
        with open(self.metrics_path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise NoSpaceError(f"{self.metrics_path}: the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def metrics(self) -> list[dict[str, Any]]:
        """The lines logged so far; one that was torn, at the end, is left out.

        Raises:
            ValueError: a damaged line before the end.
        """
        if not self.metrics_path.exists():
            return []
        # What follows the last line break was being written as the process was killed.
        lines = self.metrics_path.read_bytes().split(b"\n")[:-1]
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{self.metrics_path}: line {number}: expected a JSON object, got {line[:40]!r}")
            records.append(record)
        return records

    def mark_complete(self, checkpoint: Path) -> None:
        """Say that everything in the checkpoint is written, once it is on the disk."""
        checkpoints.mark_complete(checkpoint, metrics=len(self.metrics()))

    def complete_checkpoints(self) -> list[Path]:
        """Those that are whole, by step."""
        return [path for path in checkpoints.find(self.checkpoints_path) if checkpoints.read_marker(path) is not None]

    def last_checkpoint(self) -> Path | None:
        """The newest whole one: what ``Trainer.train(resume_from_checkpoint=...)`` takes."""
        return next(reversed(self.complete_checkpoints()), None)

    def prune(self, keep: int, best: str | os.PathLike[str] | None = None) -> None:
        """Delete all complete checkpoints but the ``keep`` newest and ``best``."""
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        kept = None if best is None else Path(best).resolve()
        for path in self.complete_checkpoints()[:-keep]:
            if path.resolve() != kept:
                checkpoints.delete(path)

    def rewind(self, checkpoint: Path | None) -> None:
        """Put the run back to where it was as ``checkpoint`` was saved, or to its beginning.

        Checkpoints that are partial or of later steps are deleted, and later lines of the metrics cut off.
        """
        step, kept = 0, 0
        if checkpoint is not None:
            marker = checkpoints.read_marker(checkpoint)
            if marker is None:
                raise ValueError(f"checkpoint: expected a complete one, got {checkpoint}")
            step, kept = marker["step"], marker["metrics"]
        for path in checkpoints.find(self.checkpoints_path):
            partial = checkpoints.read_marker(path) is None
            if partial or checkpoints.step_of(path) > step:
                _LOG.warning("deleting %s: %s", path, "partial" if partial else "of a later step")
                checkpoints.delete(path)
        if self.metrics_path.exists():
            lines = self.metrics_path.read_bytes().splitlines(keepends=True)
            if len(lines) > kept:
                write_text(self.metrics_path, b"".join(lines[:kept]).decode())


def _is_ours(entry: Path) -> bool:
    """Whether it is what a process leaves that was killed as it made the folder."""
    return entry.name in (_LOCK, ".config.yaml.tmp")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as a file gives it back: lists for tuples, text for names."""
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"config: expected plain values, what JSON can hold: {error}") from error


def _to_yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _finite(value: Any) -> Any:
    """The same with plain numbers for those of numpy and torch, and null for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(expected: Any, got: Any, name: str = "") -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            inner = f"{name}.{key}" if name else key
            yield from _differences(expected.get(key, _MISSING), got.get(key, _MISSING), inner)
    elif expected != got or isinstance(expected, bool) != isinstance(got, bool):
        shown = ("nothing" if value is _MISSING else repr(value) for value in (expected, got))
        yield "{}: expected {}, got {}".format(name, *shown)
