"""The score of a model, dense BERT or KronBert, on a task's data."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..convert.calibrate import Progress
from .data import (
    PaddingCollator,
    Task,
    best_answers,
    compute_metrics,
    encode,
    get_task,
    load_task,
    qa_features,
    resolved,
)
from .data.files import Source

MAX_LENGTH = {"classification": 128, "regression": 128, "qa": 384}


@dataclass(frozen=True)
class EvaluationResult:
    """Hold scores of a model on a task: ``metrics`` in percent, ``main`` the name of the one that is ``score``."""

    task: str
    split: str
    metrics: dict[str, float]
    main: str
    score: float
    examples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Make a JSON-able dict."""
        return dataclasses.asdict(self)


def evaluate(
    model: str | os.PathLike[str] | nn.Module,
    task: str | Task,
    source: Source | datasets.DatasetDict,
    split: str = "validation",
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score a model on a split of a task's data, in batches of like length, without gradients.

    Args:
        model: a folder or hub name of a BERT or KronBert with the task's head, or such a model. Where the names of its
            classes are the task's in another order, its predictions are put in the task's; where they are others, the
            order is taken to be the same.
        task: a task or its name; one without names of classes takes the model's, if those are not just numbered.
        source: the data, as for ``load_task``, or what that has given.
        split: "validation", "validation_mismatched" (MNLI), "train", or "test" with labels.
        batch_size: examples, or windows of a context, at a time.
        max_length: the most tokens of an input; by default 128, or 384 for question answering, or the model's
            positions if fewer.
        device: where to run; by default where the model is, and for a folder "cuda" if there is one.
        tokenizer: the model's tokenizer, needed where ``model`` is no folder or name.
        progress: called as ``progress(done, total, what)``.

    ``seconds`` is the time of the model's passes, tokenization and loading left out.
    Raises ValueError for a model whose head is not the task's, arguments out of range and data that are not as
    expected; OSError for a model or data that cannot be loaded.
    """
    task = get_task(task)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer: expected the tokenizer of the model, got None")
        network: Any = model
    else:
        tokenizer = tokenizer or load_tokenizer(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = load_scored(model, task)
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {str(device)!r} without CUDA")
    network = network if device is None else network.to(device)
    names = _class_names(network)
    if task.kind == "classification" and not task.labels and names:
        task = dataclasses.replace(task, labels=names)
    data = source if isinstance(source, datasets.DatasetDict) else load_task(source, task, [split])
    if split not in data:
        raise ValueError(f"split: expected one of {', '.join(data)}, got {split!r}")
    task, rows = resolved(task, data), data[split]
    positions = network.config.max_position_embeddings
    length = min(MAX_LENGTH[task.kind], positions) if max_length is None else max_length
    if length > positions:
        raise ValueError(f"max_length: expected at most the model's {positions} positions, got {max_length}")
    if task.kind == "qa":
        features = qa_features(rows, tokenizer, length, training=False)
        inputs = features.remove_columns(["example", "offsets"])
    else:
        if "label" not in rows.column_names:
            raise ValueError(f"split: expected data with labels, got {split} without")
        if network.config.num_labels != task.num_labels:
            raise ValueError(
                f"model: expected a head of {task.num_labels} outputs for {task.name}, got {network.config.num_labels}"
            )
        features = inputs = encode(rows, tokenizer, task, length)
    start = time.perf_counter()
    outputs = predict(network, inputs, tokenizer, batch_size, progress)
    seconds = time.perf_counter() - start
    if task.kind == "qa":
        starts, ends = [output[0] for output in outputs], [output[1] for output in outputs]
        predictions: Any = best_answers(rows, features, starts, ends, no_answer=task.no_answer)
        references: Any = rows
    else:
        predictions, references = torch.stack([output[0] for output in outputs]), features["labels"][:]
        if task.kind == "classification":
            predictions = predictions[:, _order(names, task.labels)]
    metrics = compute_metrics(task, predictions, references)
    return EvaluationResult(task.name, split, metrics, task.main, metrics[task.main], len(rows), seconds)


@torch.no_grad()
def predict(
    model: Any, features: Any, tokenizer: Any, batch_size: int = 32, progress: Progress | None = None
) -> list[tuple[Tensor, ...]]:
    """Compute the logits of each row of ``features``, float32 on the CPU: (classes,), or start and end (length,) each.

    Rows of like length go through the model together, in evaluation mode and without gradients; the results are in
    the order of the rows. ``features`` are those of ``encode`` or ``qa_features``.
    """
    lengths = features["length"][:]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    unneeded = [name for name in ("labels", "start_positions", "end_positions") if name in features.column_names]
    loader = DataLoader(features.remove_columns(unneeded), batch_sampler=batches, collate_fn=PaddingCollator(tokenizer))
    outputs: list[tuple[Tensor, ...]] = [()] * len(lengths)
    training, device = model.training, next(chain(model.parameters(), model.buffers())).device
    model.eval()
    try:
        for done, (indices, batch) in enumerate(zip(batches, loader, strict=True), 1):
            result = model(**{name: values.to(device) for name, values in batch.items()})
            logits = (result["logits"],) if "logits" in result else (result["start_logits"], result["end_logits"])
            for index, *row in zip(indices, *(part.float().cpu() for part in logits), strict=True):
                outputs[index] = tuple(row)
            if progress is not None:
                progress(done, len(batches), "batches")
    finally:
        model.train(training)
    return outputs


def load_scored(model: str | os.PathLike[str], task: Task) -> Any:
    """Load a BERT or KronBert with the task's head, from a folder or the hub.

    Raises OSError for one that cannot be loaded, ValueError for one whose head is missing.
    """
    path = Path(model)
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a folder with config.json, got {path}")
    kind = "QuestionAnswering" if task.kind == "qa" else "SequenceClassification"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    try:
        loaded, info = auto.from_pretrained(
            model, local_files_only=path.is_dir(), trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"model: {model} cannot be loaded from a folder or the hub: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model: expected a checkpoint of {type(loaded).__name__}, got {model} without {len(missing)} weights, "
            f"among them {missing[0]}"
        )
    return loaded


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """Load the tokenizer beside a model; OSError where there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model, local_files_only=Path(model).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise OSError(f"tokenizer: none can be loaded from {model}: {error}") from error


def _class_names(model: Any) -> tuple[str, ...]:
    """The names of the model's classes, in the order of its outputs; none where they are just numbered."""
    names = [str(model.config.id2label[index]) for index in sorted(model.config.id2label)]
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else tuple(names)


def _order(names: tuple[str, ...], labels: tuple[str, ...]) -> list[int]:
    """The model's output for each label: by name, case apart, or as they come where the names are others."""
    model, task = [name.lower() for name in names], [label.lower() for label in labels]
    return [model.index(label) for label in task] if sorted(model) == sorted(task) else list(range(len(labels)))
