"""Pre-training text: documents from files, packed sequences, pairs of segments and masks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distill import distill_runs

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import MaskingCollator, PaddingCollator, load_text, pack  # noqa: E402

WORDS = [*distill_runs.GOOD, *distill_runs.BAD, *distill_runs.NOUNS]
WIKITEXT = [
    " = First Title =",
    " One @-@ two . Three 1 @,@ 000 .",
    " = = Section = =",
    " Four = five .",
    " = Second =",
    " Six .",
]


def numbered(count: int, each: int) -> list[str]:
    """Documents of ``each`` sentences, every one of four times the same word: that of its document."""
    return ["\n".join([" ".join([WORDS[index]] * 4)] * each) for index in range(count)]


def test_documents_of_files_and_folders(tmp_path: Path) -> None:
    text = b"\n\none\ntwo\n\n \nthree = four\n"
    for name, content in (("a.txt", text), ("a.txt.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(content)
        assert load_text(tmp_path / name) == ["one\ntwo", "three = four"]
    (tmp_path / "wiki.txt").write_text("\n\n".join(WIKITEXT))
    assert load_text(tmp_path / "wiki.txt") == ["One-two . Three 1,000 .\nFour = five .", "Six ."]
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "README.md").write_text("not this")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("a1", "a2\nmore")))
    datasets.Dataset.from_dict({"body": ["c"]}).to_parquet(folder / "deep" / "c.parquet")
    assert load_text([folder, folder / "b.txt"], "body") == ["a1", "a2\nmore", "b", "c", "b"]


def test_text_of_the_hub_and_text_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}')
    with pytest.raises(ValueError, match=r"a.jsonl, row 2: expected a column 'text' with a string, got \{'text'"):
        load_text(tmp_path / "a.jsonl")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((*a, k)) or [{"text": "one"}])
    assert load_text("wikimedia/wikipedia:20231101.en") == ["one"]
    assert asked == [("wikimedia/wikipedia", "20231101.en", {"split": "train"})]


def test_sequences_are_full_but_for_the_last_of_a_document(tokenizer: Any) -> None:
    texts = ["the king sees a child\n\nand a song likes the calm river", "", "a calm king"]
    rows = pack(texts, tokenizer, 8)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"]] == [
        ["[CLS]", "the", "king", "sees", "a", "child", "and", "[SEP]"],
        ["[CLS]", "a", "song", "likes", "the", "calm", "river", "[SEP]"],
        ["[CLS]", "a", "calm", "king", "[SEP]"],
    ]
    assert rows["length"][:] == [8, 8, 5]
    assert rows["token_type_ids"][2] == [0] * 5
    with pytest.raises(ValueError, match="max_length: expected at least 8, got 7"):
        pack(["the king"], tokenizer, 7)
    with pytest.raises(ValueError, match="next_sentence: expected at least two documents"):
        pack(["the\nking"], tokenizer, next_sentence=True)


def test_pairs_follow_each_other_or_come_from_different_documents(tokenizer: Any) -> None:
    """Half of them, also where single sentences, which have no continuation, are in the way."""
    texts = [*numbered(14, 9), *numbered(14, 1)] * 20
    rows, same, other = (pack(texts, tokenizer, 24, next_sentence=True, seed=seed) for seed in (1, 1, 2))
    assert rows[:] == same[:] != other[:]
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert (words[0], words[-1], words.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
        middle = words.index("[SEP]")
        assert row["token_type_ids"] == [0] * (middle + 1) + [1] * (len(words) - middle - 1)
        assert row["length"] == len(words) <= 24
        a, b = set(words[1:middle]), set(words[middle + 1 : -1])
        assert len(a) == len(b) == 1
        assert a == b or row["next_sentence_label"] == 1
    labels = rows["next_sentence_label"][:]
    assert len(labels) > 500
    assert abs(sum(labels) / len(labels) - 0.5) < 0.06


def test_masks(tokenizer: Any) -> None:
    rows = pack(numbered(14, 200), tokenizer, 24, next_sentence=True)
    examples = [rows[index] for index in range(400)]
    collator = MaskingCollator(tokenizer, seed=5)
    batch = collator(examples)
    plain = torch.full(batch["labels"].shape, tokenizer.pad_token_id)
    for index, row in enumerate(examples):
        plain[index, : row["length"]] = torch.tensor(row["input_ids"])
    chosen = batch["labels"] != -100
    special = torch.isin(plain, torch.tensor([tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]))
    assert not (chosen & special).any()
    assert torch.equal(batch["attention_mask"] == 0, plain == tokenizer.pad_token_id)
    assert torch.equal(batch["labels"][chosen], plain[chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain[~chosen])
    assert 0.13 < chosen.sum() / (~special).sum() < 0.17
    masked = batch["input_ids"][chosen] == tokenizer.mask_token_id
    changed = (batch["input_ids"] != plain)[chosen] & ~masked
    # A tenth, less those replaced by chance by themselves or [MASK].
    assert 0.76 < masked.float().mean() < 0.84
    assert 0.06 < changed.float().mean() < 0.12
    # A resumed run skips batches: what a collator was given before must not matter.
    assert torch.equal(collator(examples)["input_ids"], batch["input_ids"])
    assert not torch.equal(MaskingCollator(tokenizer, seed=2)(examples)["labels"], batch["labels"])
    full = [row for row in pack(numbered(14, 200), tokenizer, 24) if row["length"] == 24]
    one, other = (collator(full[start : start + 50])["labels"] != -100 for start in (0, 50))
    assert not torch.equal(one, other)


def test_padding_collator(tokenizer: Any) -> None:
    rows = [{"input_ids": [2, 5, 3], "length": 3, "labels": 1}, {"input_ids": [2, 3], "length": 2, "labels": 0}]
    batch = PaddingCollator(tokenizer)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch["labels"].dtype is torch.int64
    assert PaddingCollator(tokenizer)([{**row, "labels": 0.5} for row in rows])["labels"].dtype is torch.float32
