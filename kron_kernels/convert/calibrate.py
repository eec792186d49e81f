"""Calibration: the second moments of a model's layer inputs on sample text, which data-aware fits weigh errors by."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .conv1d import is_conv1d
from .input_moments import InputRecorder, InputStatistics

_FORMAT = "kron_kernels.calibration"
_VERSION = 1

Progress = Callable[[int, int, str], None]


class Calibration(Mapping[str, Tensor]):
    """Mapping from module name to the moment C = E[x x^T] (n, n) of that module's inputs.

    ``input_mean[name]`` is E[x] (n,), ``tokens[name]`` the number of rows behind both, ``covariance(name)`` is C less
    the mean's part. Modules that were fed the same tensors (Q, K and V of an attention layer) share one statistics
    object, in memory and in the file. ``save`` and ``load`` keep it in a safetensors file.
    """

    def __init__(self, statistics: Mapping[str, InputStatistics]) -> None:
        self._statistics = dict(statistics)

    def __getitem__(self, name: str) -> Tensor:
        return self._statistics[name].moment

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    @property
    def input_mean(self) -> dict[str, Tensor]:
        """Module name -> mean of its inputs (n,)."""
        return {name: statistics.mean for name, statistics in self._statistics.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Module name -> number of input rows (unpadded tokens) that were seen."""
        return {name: statistics.tokens for name, statistics in self._statistics.items()}

    def covariance(self, name: str) -> Tensor:
        """E[x x^T] - E[x] E[x]^T (n, n): the moment to fit with where the bias takes up the mean error."""
        statistics = self._statistics[name]
        return statistics.moment - torch.outer(statistics.mean, statistics.mean).to(statistics.moment.dtype)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write to a safetensors file, whole or not at all; FileExistsError where it exists and not ``overwrite``."""
        from safetensors.torch import save_file

        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
        groups: dict[int, list[str]] = {}
        for name, statistics in self._statistics.items():
            groups.setdefault(id(statistics), []).append(name)
        members = list(groups.values())
        tensors = {}
        for index, names in enumerate(members):
            statistics = self._statistics[names[0]]
            tensors[f"{index}.moment"] = statistics.moment.cpu().contiguous()
            tensors[f"{index}.mean"] = statistics.mean.cpu().contiguous()
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "modules": json.dumps(members),
            "tokens": json.dumps([self._statistics[names[0]].tokens for names in members]),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what ``save`` wrote; ValueError for a file that is damaged or of another kind or version."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
                    kind = f"{metadata.get('format')!r} version {metadata.get('version')!r}"
                    raise ValueError(f"path: expected a {_FORMAT} file of version {_VERSION}, {path} is {kind}")
                statistics = {}
                counts = json.loads(metadata["tokens"])
                for index, names in enumerate(json.loads(metadata["modules"])):
                    moment, mean = file.get_tensor(f"{index}.moment"), file.get_tensor(f"{index}.mean")
                    shared = InputStatistics(moment, mean, counts[index])
                    statistics.update(dict.fromkeys(names, shared))
        except (SafetensorError, KeyError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {path} is damaged or no safetensors file: {error}") from None
        return cls(statistics)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    modules: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """Run ``model`` over ``batches`` and gather the second moment and mean of the inputs of its linear layers.

    Each batch is a mapping of keyword arguments, as a tokenizer returns it, a tuple of positional ones, or one tensor;
    tensors are moved to the model's device. Where a mapping holds an ``attention_mask`` (B, L), inputs of shape
    (B, L, n) or (B*L, n) leave out the tokens it marks with 0. ``modules`` names the modules to watch (any that
    take a tensor of fixed width first); every nn.Linear and Conv1D that runs, unless given. ``dtype`` is that of sums
    and moments, float32 or float64; the memory needed is one (n, n) matrix for each distinct input. The first batch
    runs twice: once to see which modules share an input. ``progress(done, total, what)`` is called after each pass.

    The model runs in evaluation mode, without gradients, and is left as it was, its hooks removed, also after an
    error. Raises ValueError for unknown names, no batches, a batch of another kind, a mask of another shape and
    inputs that are not finite; RuntimeError where modules share inputs in the first batch but not in a later one.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    watched = _watched(model, modules)
    batches = list(batches)
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    recorder = InputRecorder(dtype)
    with evaluating(model), ExitStack() as hooks:
        for name, module in watched.items():
            handle = module.register_forward_pre_hook(recorder.hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for done, batch in enumerate([batches[0], *batches]):
            args, kwargs = _arguments(batch, model)
            recorder.begin(_mask(kwargs))
            model(*args, **kwargs)
            recorder.end()
            if progress is not None:
                progress(done + 1, len(batches) + 1, "calibrating")
    if modules is not None and (idle := [name for name in modules if name not in recorder.groups]):
        raise ValueError(f"modules: {', '.join(idle)} did not run")
    return Calibration(recorder.statistics())


def count_tokens(batches: Iterable[Mapping[str, Tensor]], vocabulary: int) -> Tensor:
    """How often each token occurs in ``batches``, (vocabulary,) int64: what an embedding's fit weighs rows by.

    Each batch holds ``input_ids`` (B, L) and, where it has padding, an ``attention_mask`` (B, L): tokens it marks with
    0 are left out. Raises ValueError for a batch without ids, ids outside the vocabulary and where no token is left.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError("batches: expected mappings that hold input_ids (B, L), got one without")
        ids, mask = batch["input_ids"].cpu(), _mask(batch)
        ids = ids.flatten() if mask is None else ids[mask.cpu()]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"batches: expected ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        counts += torch.bincount(ids, minlength=vocabulary)
    if not counts.any():
        raise ValueError("batches: expected at least one token, got none")
    return counts


def _watched(model: nn.Module, modules: Sequence[str] | None) -> dict[str, nn.Module]:
    named = dict(model.named_modules())
    if modules is None:
        watched: dict[str, nn.Module] = {
            name: module for name, module in named.items() if isinstance(module, nn.Linear) or is_conv1d(module)
        }
        if not watched:
            raise ValueError("model: expected at least one nn.Linear, got none; name the modules to calibrate")
        return watched
    if isinstance(modules, str):
        raise TypeError(f"modules: expected a sequence of names, got the string {modules!r}")
    for name in modules:
        if name not in named:
            hint = difflib.get_close_matches(name, named, n=1)
            raise ValueError(f"modules: {name!r} is no module of the model" + (f"; is it {hint[0]!r}?" if hint else ""))
    return {name: named[name] for name in modules}


def _arguments(batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch, its tensors on the model's device."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(batch, Mapping):
        return (), {name: moved(value) for name, value in batch.items()}
    if isinstance(batch, Tensor):
        return (moved(batch),), {}
    if isinstance(batch, (tuple, list)):
        return tuple(moved(value) for value in batch), {}
    raise ValueError(f"batches: expected mappings, tuples or tensors, got {type(batch).__name__}")


def _mask(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected a tensor (B, L), got {got}")
    return mask != 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module's own mode again after."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
