"""A tiny random BERT with a tokenizer of its own, and sentences of its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "and", "or", "small", "big", "red", "blue"]
SENTENCES = [f"the {left} {verb} a {right}" for left in WORDS[2:5] for verb in WORDS[5:8] for right in WORDS[2:5]]


def save_bert(folder: Path, architecture: type[Any] = transformers.BertModel) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    architecture(transformers.BertConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained(folder)
    return folder
