"""Text to calibrate on: lines of a file, tokenized into batches of like length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_tokenizer

BATCH = 32
MAX_LENGTH = 128
_COUNTED = 10_000  # sentences tokenized at a time


def read_lines(text: str | os.PathLike[str], most: int) -> list[str]:
    """Read the first ``most`` lines of a UTF-8 text file that are not blank; ValueError where there is none."""
    if most < 1:
        raise ValueError(f"calibrate_lines: expected at least 1, got {most}")
    try:
        lines = [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"calibrate: expected UTF-8 text, got {text}: {error}") from error
    lines = [line for line in lines if line][:most]
    if not lines:
        raise ValueError(f"calibrate: expected text, a sentence a line, got {text} without any")
    return lines


def tokenize(tokenizer: Any, sentences: list[str], max_length: int = MAX_LENGTH) -> list[dict[str, Tensor]]:
    """Make padded batches of ``input_ids`` and ``attention_mask``, each (up to 32, length).

    Sentences of like length go together, so the order of the sentences is not kept.
    """
    ordered = sorted(sentences, key=len)
    batches = []
    for start in range(0, len(ordered), BATCH):
        encoded = tokenizer(
            ordered[start : start + BATCH], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return batches


def token_counts(tokenizer: Any, sentences: list[str], vocab_size: int) -> Tensor:
    """Count how often each token id occurs in the sentences: (vocab_size,), int64."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for start in range(0, len(sentences), _COUNTED):
        rows = tokenizer(sentences[start : start + _COUNTED], add_special_tokens=True, truncation=True)["input_ids"]
        counts += torch.bincount(torch.tensor([token for row in rows for token in row]), minlength=vocab_size)
    return counts


def text_batches(model: Any, tokenizer_dir: str | os.PathLike[str], sentences: list[str]) -> list[dict[str, Tensor]]:
    """Tokenize the sentences; random token ids (8, 64) where there are none."""
    if not sentences:
        length = min(64, model.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(model.config.vocab_size, (8, length), generator=generator)}]
    limit = min(MAX_LENGTH, model.config.max_position_embeddings)
    return tokenize(load_tokenizer(tokenizer_dir), sentences, limit)
