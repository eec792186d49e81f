"""The folder of one run of distillation: its identity, transformers' checkpoints, its model and what it came to."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import sort_checkpoints

from ..compress.files import sync, write_text
from ..testing import describe_machine

VERSION = 1
KINDS = ("finetune", "pretrain", "task")
_LOG = logging.getLogger(__name__)
_IDENTITY, _RESULT, _MARKER, _LOCK = "run.json", "result.json", "complete.json", ".lock"
_HELD: dict[tuple[int, Path], Any] = {}  # open lock files, by process and folder


@dataclass(frozen=True)
class RunResult:
    """Hold what a finished run came to.

    Attributes:
        kind: "finetune" (a dense model on a task), "pretrain" (stage 1) or "task" (stage 2).
        name: of the model: "teacher", "K8", ...
        task: "sst2", "mrpc", ...; of stage 1 the name of its text.
        seed: of the run.
        parameters: of the model.
        steps, seconds: updates of the weights; time of training, over all starts.
        variant: what sets the run apart from the usual one, such as "no stage 1"; "" for the usual one.
        metrics: metric -> value on the development set.
        score: the task's main metric in percent; None where there is none, as in stage 1.
        teacher_score, teacher_parameters: the same of the run's teacher; None without a teacher or its score.
        peak_memory_bytes: largest memory in use, as far as it was logged.
        train_tokens: tokens seen in training, padding left out.
    """

    kind: str
    name: str
    task: str
    seed: int
    parameters: int
    steps: int
    seconds: float
    variant: str = ""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    score: float | None = None
    teacher_score: float | None = None
    teacher_parameters: int | None = None
    peak_memory_bytes: int | None = None
    train_tokens: int | None = None

    @property
    def label(self) -> str:
        """Join name and variant, as tables and plots show them."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def to_dict(self) -> dict[str, Any]:
        """Make a JSON-able dict with a ``version``."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> RunResult:
        """Read what ``to_dict`` gave; ValueError for another version and for missing or unknown fields."""
        if not isinstance(data, dict) or data.get("version") != VERSION or data.get("kind") not in KINDS:
            raise ValueError(f"expected a run's result of version {VERSION}, got {str(data)[:60]}")
        try:
            return cls(**{name: value for name, value in data.items() if name != "version"})
        except TypeError as error:
            raise ValueError(str(error)) from None


class RunFolder:
    """A run on disk. ``RunFolder(path)`` reads one, of whatever state; :meth:`create` starts or resumes one.

    | entry | what |
    | --- | --- |
    | ``run.json`` | the run's identity: its configuration, and the sha256 of its data and of its teacher's weights |
    | ``checkpoints/checkpoint-N`` | transformers' checkpoints, each with the sha256 of its files in ``complete.json`` |
    | ``start`` | the student as it was made, where the run made it |
    | ``model`` | the final model with its tokenizer |
    | ``curves.png`` | losses and metrics over the steps, drawn |
    | ``result.json`` | the :class:`RunResult`, the log and the machine; a run that has one is finished |

    A checkpoint counts only where all of its files have the hashes written last: a kill may come within a write.

    Raises:
        FileNotFoundError: ``path`` is not a run's folder.
    """

    is_new = False  # whether create made it here

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints_path = self.path / "checkpoints"  # the output_dir of transformers' TrainingArguments
        self.start_path = self.path / "start"
        self.model_path = self.path / "model"
        if not (self.path / _IDENTITY).is_file():
            raise FileNotFoundError(f"run: expected a run's folder, with {_IDENTITY}, got {self.path}")

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], resume: bool | None = None) -> RunFolder:
        """Start a run, or resume one of the same configuration. The folder is this process's own until that ends.

        Args:
            path: folder; its parents are made.
            config: plain values (what JSON can hold) by name, nested as one likes.
            resume: True asks for an existing run, False for a new one, None takes either.

        Raises:
            ValueError: the run there has another configuration; the message names what differs.
            FileExistsError: a file, a folder of something else, or, where ``resume`` is False, a run.
            FileNotFoundError: no run where ``resume`` is True.
            BlockingIOError: another process is at work in the folder.
        """
        path, plain = Path(path), json.loads(json.dumps(dict(config)))
        is_new = not (path / _IDENTITY).is_file()
        if resume is False and not is_new:
            raise FileExistsError(f"run: {path} exists; resume it, or choose another folder")
        if resume and is_new:
            raise FileNotFoundError(f"run: expected a run to resume, got {path}")
        # What a process leaves that was killed as it made the folder.
        ours = (_LOCK, f".{_IDENTITY}.tmp")
        if is_new and path.exists() and not (path.is_dir() and all(entry.name in ours for entry in path.iterdir())):
            raise FileExistsError(f"run: expected a new folder or a run's, got {path}, which holds other things")
        path.mkdir(parents=True, exist_ok=True)
        _lock(path)
        if is_new:
            write_text(path / _IDENTITY, json.dumps({"config": plain}, indent=2) + "\n")
        run = cls(path)
        run.is_new = is_new
        run.identify(config=plain)
        return run

    def identify(self, **parts: Any) -> None:
        """Write down parts of the run's identity that are new; ValueError for one that differs from the run's."""
        known = self.identity
        for name, value in parts.items():
            if name in known and known[name] != value:
                differing = list(_differences(known[name], value))
                detail = f": {'; '.join(differing[:3])}" if isinstance(value, dict) else ""
                raise ValueError(
                    f"{name}: {self.path} holds a run with another {name}{detail}; choose another folder, or resume "
                    f"with the {name} it was begun with"
                )
        if parts.keys() - known.keys():
            write_text(self.path / _IDENTITY, json.dumps({**known, **parts}, indent=2) + "\n")

    def discard(self) -> None:
        """Delete the folder where :meth:`create` began the run here; else nothing."""
        if self.is_new:
            shutil.rmtree(self.path)
            _HELD.pop((os.getpid(), self.path.resolve())).close()

    @property
    def identity(self) -> dict[str, Any]:
        """Read ``run.json``; ValueError for a damaged file."""
        return _read_json(self.path / _IDENTITY)

    @property
    def config(self) -> dict[str, Any]:
        """Give the run's configuration."""
        return self.identity["config"]

    @property
    def result(self) -> RunResult | None:
        """Read what the run came to, None before its end; ValueError for a damaged file."""
        path = self.path / _RESULT
        if not path.is_file():
            return None
        data = _read_json(path)
        try:
            return RunResult.from_dict(data["result"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def log(self) -> list[dict[str, Any]]:
        """Give what the Trainer logged, up to the last checkpoint of a run that is not finished."""
        if (self.path / _RESULT).is_file():
            return _read_json(self.path / _RESULT)["log"]
        states = [path / "trainer_state.json" for path in reversed(self._checkpoints())]
        return next((_read_json(state)["log_history"] for state in states if state.is_file()), [])

    def finish(self, result: RunResult, log: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write ``result.json``, the last thing a run does; numbers that are not finite become null."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = {"transformers": importlib.metadata.version("transformers"), "device": device}
        document = {"result": result.to_dict(), "environment": {**describe_machine(), **versions}, "log": list(log)}
        write_text(self.path / _RESULT, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")

    def last_checkpoint(self) -> Path | None:
        """Find the newest checkpoint that is whole."""
        return next((path for path in reversed(self._checkpoints()) if _is_whole(path)), None)

    def rewind(self) -> None:
        """Delete checkpoints after the last whole one, partial or damaged, and say so."""
        last, paths = self.last_checkpoint(), self._checkpoints()
        for path in paths[0 if last is None else paths.index(last) + 1 :]:
            _LOG.warning("%s is damaged or was not written to its end: resuming from %s", path, last or "the start")
            shutil.rmtree(path)

    def _checkpoints(self) -> list[Path]:
        return [Path(path) for path in sort_checkpoints(str(self.checkpoints_path))]


def mark_complete(checkpoint: Path) -> None:
    """Write the hashes of a checkpoint's files, once all of them are on the disk."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _MARKER:
            sync(path)
            files[path.relative_to(checkpoint).as_posix()] = _sha256(path)
    sync(checkpoint)
    write_text(checkpoint / _MARKER, json.dumps(files, indent=2) + "\n")


def rows_fingerprint(*tables: Any) -> str:
    """Hash the rows of Datasets, in their order."""
    digest = hashlib.sha256()
    for rows in tables:
        for start in range(0, len(rows), 1000):
            digest.update(json.dumps(rows[start : start + 1000], sort_keys=True).encode())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Hash the names, dtypes and values of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
        return all(_sha256(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _lock(folder: Path) -> None:
    """Hold a folder until the process ends: closing any descriptor of the file would give its lock up."""
    key = (os.getpid(), folder.resolve())
    if key in _HELD:
        return
    file = open(folder / _LOCK, "ab")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise BlockingIOError(f"run: another process is at work in {folder}") from None
    _HELD[key] = file


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged file: {error}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(expected: Any, got: Any, name: str = "") -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in {**expected, **got}:
            yield from _differences(expected.get(key), got.get(key), f"{name}.{key}" if name else key)
    elif expected != got:
        yield f"{name}: expected {expected!r}, got {got!r}"
