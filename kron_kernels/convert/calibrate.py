"""Calibration: the second moments of a model's layer inputs on sample text, which data-aware fits weigh errors by."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .conv1d import is_conv1d
from .input_moments import InputRecorder, InputStatistics

Progress = Callable[[int, int, str], None]


class Calibration(Mapping[str, Tensor]):
    """Mapping from module name to the moment C = E[x x^T] (n, n) of that module's inputs.

    ``input_mean[name]`` is E[x] (n,), ``tokens[name]`` the number of rows behind both. Modules that were fed the same
    tensors (Q, K and V of an attention layer) share one moment. ``token_counts`` (vocabulary,) says how often each
    token id occurs in the text, None where the batches hold no ``input_ids``.
    """

    def __init__(self, statistics: Mapping[str, InputStatistics], token_counts: Tensor | None = None) -> None:
        self._statistics = dict(statistics)
        self.token_counts = token_counts

    def __getitem__(self, name: str) -> Tensor:
        return self._statistics[name].moment

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    @property
    def input_mean(self) -> dict[str, Tensor]:
        """Map module names to the mean of their inputs (n,)."""
        return {name: statistics.mean for name, statistics in self._statistics.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """Map module names to the number of input rows (unpadded tokens) that were seen."""
        return {name: statistics.tokens for name, statistics in self._statistics.items()}


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    modules: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run ``model`` over ``batches`` and gather the second moment and mean of the inputs of its linear layers.

    Each batch is a mapping of keyword arguments, as a tokenizer returns it, a tuple of positional ones, or one tensor;
    tensors are moved to the model's device. Where a mapping holds an ``attention_mask`` (B, L), inputs of shape
    (B, L, n) or (B*L, n) leave out the tokens it marks with 0. ``modules`` names the modules to watch (any that
    take a tensor of fixed width first); default: every nn.Linear and Conv1D that runs. Sums and moments are float32;
    the memory needed is one (n, n) matrix for each distinct input. The first batch runs twice: once to see which
    modules share an input. ``progress(done, total, what)`` is called after each pass.

    The model runs in evaluation mode, without gradients, and is left as it was, its hooks removed, also after an
    error. Raises ValueError for unknown names, no batches, a batch of another kind, a mask of another shape and
    inputs that are not finite; RuntimeError where modules share inputs in the first batch but not in a later one.
    """
    watched = _watched(model, modules)
    batches = list(batches)
    if not batches:
        raise ValueError("batches: expected at least one batch, got none")
    recorder = InputRecorder()
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
    return Calibration(recorder.statistics(), _token_counts(model, batches))


def _token_counts(model: nn.Module, batches: Sequence[Any]) -> Tensor | None:
    """Count the ids of all batches that are no padding, as long as the model's vocabulary."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None or not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches):
        return None
    counts = torch.zeros(size, dtype=torch.long)
    for batch in batches:
        mask = _mask(batch)
        ids = batch["input_ids"] if mask is None else batch["input_ids"][mask]
        counts += torch.bincount(ids.flatten().cpu(), minlength=size)
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
    """Return the positional and keyword arguments of a batch, its tensors on the model's device."""
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
    """Put ``model`` in evaluation mode within the block, and restore every module's own mode after it."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
