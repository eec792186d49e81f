"""The score of a sentence encoder on pairs of texts with a graded similarity: correlation with the cosines."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn

from .data import Task, compute_metrics, get_task, load_task
from .data.files import Source
from .encoder import encode
from .evaluate import EvaluationResult, load_tokenizer

MAX_LENGTH = 128


def evaluate_similarity(
    model: str | os.PathLike[str] | nn.Module,
    task: str | Task,
    source: Source,
    split: str = "validation",
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    tokenizer: Any = None,
) -> EvaluationResult:
    """Score the cosines of mean-pooled vectors of both texts against the labels, in percent (Spearman, Pearson).

    Args:
        model: a folder or hub name of an encoder, dense or compressed, or one that is loaded.
        task: a regression on pairs, "stsb" or one of your own.
        source, split: as for ``evaluate``.
        max_length: the most tokens of a text; by default 128, or the model's positions if fewer.
        batch_size: texts at a time.
        tokenizer: needed where ``model`` is no folder or name.

    Raises ValueError for a task of another kind, data without labels and a ``max_length`` beyond the model's positions;
    OSError for a model or data that cannot be loaded.
    """
    task = get_task(task)
    if task.kind != "regression" or not task.pair:
        raise ValueError(f"task: expected a regression on pairs of texts for similarities, got {task.name}")
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer: expected the tokenizer of the model, got None")
        encoder: Any = model
    else:
        encoder, tokenizer = load_encoder(model), tokenizer or load_tokenizer(model)
    positions = encoder.config.max_position_embeddings
    length = min(MAX_LENGTH, positions) if max_length is None else max_length
    if not 1 <= length <= positions:
        raise ValueError(f"max_length: expected 1 to the model's {positions} positions, got {max_length}")
    rows = load_task(source, task, [split])[split]
    if "label" not in rows.column_names:
        raise ValueError(f"split: expected data with labels, got {split} without")
    texts = [rows[name][:] for name in ("text", "text_pair")]
    different = list(dict.fromkeys(text for column in texts for text in column))
    place = {text: index for index, text in enumerate(different)}
    start = time.perf_counter()
    ids = tokenizer(different, truncation=True, max_length=length)["input_ids"]
    vectors = encode(encoder.eval(), ids, tokenizer.pad_token_id or 0, batch_size)
    first, second = (vectors[[place[text] for text in column]] for column in texts)
    seconds = time.perf_counter() - start
    metrics = compute_metrics(task, (first * second).sum(-1), rows["label"][:])
    return EvaluationResult(task.name, split, metrics, task.main, metrics[task.main], len(rows), seconds)


def load_encoder(model: str | os.PathLike[str]) -> Any:
    """Load the encoder of a folder or hub name; OSError for one that is missing, damaged or incomplete."""
    try:
        loaded, info = transformers.AutoModel.from_pretrained(
            model, local_files_only=Path(model).is_dir(), trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"model: {model} cannot be loaded from a folder or the hub: {error}") from error
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise OSError(f"model: {model} lacks {len(missing)} weights, among them {missing[0]}")
    return loaded.eval()
