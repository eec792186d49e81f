"""A tiny BERT with a tokenizer and a generated task, for the tests of the distillation's stages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GOOD, BAD = ["bright", "kind", "calm", "warm"], ["grim", "cold", "cruel", "dull"]
NOUNS = ["house", "river", "king", "child", "song", "garden"]
VERBS = ["sees", "hears", "likes", "finds"]
OTHERS = ["the", "a", "and", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NOUNS, *VERBS, *OTHERS]


def save_bert(folder: Path, architecture: type[Any] = transformers.BertModel, **options: Any) -> Path:
    """A random BERT of that class, with a tokenizer for ``VOCABULARY``."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), initializer_range=0.2, **SIZES, **options)
    architecture(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences of 4 to 9 words; the class says whether the adjectives are good ones."""
    drawn = random.Random(seed)
    found = []
    for _ in range(count):
        label = drawn.randrange(2)
        adjectives = (BAD, GOOD)[label]
        words = ["the", drawn.choice(adjectives), drawn.choice(NOUNS), drawn.choice(VERBS)]
        if drawn.random() < 0.6:
            words += ["a", drawn.choice(adjectives), drawn.choice(NOUNS)]
        if drawn.random() < 0.5:
            words += [".", "and"][: drawn.randrange(1, 3)]
        found.append((" ".join(words), label))
    return found


def save_task(folder: Path, train: int = 128, validation: int = 40) -> Path:
    """The sentences as SST-2's files."""
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 1), ("dev", validation, 2)):
        rows = [f"{text}\t{label}" for text, label in sentences(count, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return folder


def save_text(path: Path) -> Path:
    """Documents of ten sentences each."""
    texts = [text for text, _ in sentences(300, 3)]
    path.write_text("\n\n".join("\n".join(texts[start : start + 10]) for start in range(0, 300, 10)), encoding="utf-8")
    return path
