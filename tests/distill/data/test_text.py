"""Pre-training text: documents from files, packed sequences, pairs of segments and masks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.distill import distill_runs

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import MaskingCollator, PaddingCollator, load_text, pack  # noqa: E402
from kron_kernels.distill.data.text import sentence_pairs, sentences  # noqa: E402

WORDS = [*distill_runs.GOOD, *distill_runs.BAD, *distill_runs.NOUNS]
WIKITEXT = """\
 = First Title =

 One @-@ two . Three 1 @,@ 000 .

 = = Section = =

 Four = five .

 = Second =

 Six .
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(distill_runs.save_bert(tmp_path_factory.mktemp("words") / "bert"))


def numbered(count: int, each: int, length: int = 4) -> list[str]:
    """Documents of ``each`` sentences, every one of ``length`` times the same word: that of its document."""
    return ["\n".join([" ".join([WORDS[index]] * length)] * each) for index in range(count)]


def test_documents_of_files_and_folders(tmp_path: Path) -> None:
    text = b"\n\none\ntwo\n\n \nthree = four\n"
    for name, content in (("a.txt", text), ("a.txt.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(content)
        assert load_text(tmp_path / name) == ["one\ntwo", "three = four"]
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    assert load_text(tmp_path / "wiki.txt") == ["One-two . Three 1,000 .\nFour = five .", "Six ."]
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "README.md").write_text("not this")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("a1", "a2\nmore")))
    datasets.Dataset.from_dict({"body": ["c"]}).to_parquet(folder / "deep" / "c.parquet")
    assert load_text([folder, folder / "b.txt"], "body") == ["a1", "a2\nmore", "b", "c", "b"]


def test_text_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str, source: Any, column: str = "text") -> None:
        with pytest.raises((ValueError, OSError), match=message):
            load_text(source, column)

    (tmp_path / "blank.txt").write_text("\n \n")
    refuse(r"data: expected text, got none in .*blank.txt", tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("one\né".encode("latin-1"))
    refuse(r"latin.txt: cannot be read as text: 'utf-8' codec", tmp_path / "latin.txt")
    (tmp_path / "a.md").write_text("a")
    refuse(r"data: expected files of .txt, .jsonl, .parquet, got", tmp_path / "a.md")
    refuse(r"data: expected a folder, a file or a data set's name, got absent.txt", "absent.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}')
    refuse(r"a.jsonl, row 2: expected a column 'text' with a string, got \{'text': None\}", tmp_path / "a.jsonl")
    refuse(r"a.jsonl, row 1: expected a column 'body' with a string", tmp_path / "a.jsonl", "body")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((*a, k)) or [{"text": "one"}])
    assert load_text("wikimedia/wikipedia:20231101.en") == ["one"]
    assert asked == [("wikimedia/wikipedia", "20231101.en", {"split": "train"})]


def test_sentences() -> None:
    text = 'He said "No." Then he left! Why? (Nobody knows.) It cost 3.5 dollars\nnext line . Wiki style .'
    wanted = ['He said "No."', "Then he left!", "Why?", "(Nobody knows.)", "It cost 3.5 dollars"]
    assert sentences(text) == [*wanted, "next line .", "Wiki style ."]


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
    assert set(rows.column_names) == {"input_ids", "token_type_ids", "length"}


def segments(row: dict[str, Any], tokenizer: Any) -> tuple[list[str], list[str]]:
    """The words of A and of B of a row, whose form is checked."""
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert (words[0], words[-1], words.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    middle = words.index("[SEP]")
    assert row["token_type_ids"] == [0] * (middle + 1) + [1] * (len(words) - middle - 1)
    assert row["length"] == len(words)
    return words[1:middle], words[middle + 1 : -1]


def test_pairs_follow_each_other_or_come_from_different_documents(tokenizer: Any) -> None:
    """Half of them, also where single sentences, which have no continuation, are in the way."""
    for texts in (numbered(14, 200), [*numbered(14, 9), *numbered(14, 1)] * 20):
        rows = pack(texts, tokenizer, 24, next_sentence=True)
        for row in rows:
            a, b = segments(row, tokenizer)
            assert len(a) + len(b) <= 21
            assert len(set(a)) == len(set(b)) == 1
            assert set(a) == set(b) or row["next_sentence_label"] == 1
        labels = rows["next_sentence_label"][:]
        assert len(labels) > 500
        assert abs(sum(labels) / len(labels) - 0.5) < 0.06


def test_every_sentence_is_used_once_and_b_is_as_long_as_the_continuation() -> None:
    # Two documents of 30 sentences, each a token that is its own place.
    tokens = np.arange(60, dtype=np.int32).reshape(60, 1)
    corpus = [list(tokens[:30]), list(tokens[30:])]
    for seed in range(20):
        used: list[int] = []
        for a, b, follows in sentence_pairs(corpus, 20, seed):
            first, cut = int(a[0]), int(a[-1]) + 1
            end = 30 if first < 30 else 60
            last = min(end, first + 20)
            assert len(b) == (last - cut if last - first > 1 else 1)
            assert np.array_equal(b, np.arange(b[0], b[0] + len(b)))
            assert (b[0] == cut) if follows else (b[-1] < 30) != (first < 30)
            used += [*a, *b] if follows else [*a]
        assert used == list(range(60))


def test_lengths_tell_nothing_about_the_label(tokenizer: Any) -> None:
    # Short documents among long ones, which could give a longer B than the continuation.
    rows = pack([*numbered(14, 50), *numbered(14, 2) * 40], tokenizer, 24, next_sentence=True, seed=3)
    short = [(row["next_sentence_label"], row["length"]) for row in rows if row["length"] < 24]
    means = [np.mean([length for label, length in short if label == wanted]) for wanted in (0, 1)]
    assert abs(means[0] - means[1]) < 0.5


def test_long_sentences_are_cut_to_fit_and_pairs_are_seeded(tokenizer: Any) -> None:
    texts = [" ".join([WORDS[index]] * 40) + "\n" + " ".join([WORDS[index + 1]] * 30) for index in range(10)]
    first, same, other = (pack(texts, tokenizer, 16, next_sentence=True, seed=seed)[:] for seed in (1, 1, 2))
    assert first == same != other
    for ids, types in zip(first["input_ids"], first["token_type_ids"], strict=True):
        assert (len(ids), min(types.count(0) - 2, types.count(1) - 1)) == (16, 6)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["the king"], {"seq_len": 7}, "max_length: expected at least 8, got 7"),
        (["the\nking"], {"next_sentence": True}, "next_sentence: expected at least two documents, .* got 1"),
        (
            ["the", "king"],
            {"next_sentence": True},
            "next_sentence: expected at least two documents, and one of several",
        ),
    ],
)
def test_what_cannot_be_packed(texts: list[str], options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        pack(texts, tokenizer, **options)


def test_masks(tokenizer: Any) -> None:
    rows = pack(numbered(14, 200), tokenizer, 24, next_sentence=True)
    examples = [rows[index] for index in range(400)]
    collator = MaskingCollator(tokenizer, seed=5)
    batch = collator(examples)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label"}
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
    assert not torch.equal(collator(examples[::-1])["labels"].flip(0), batch["labels"])
    rows = pack(numbered(14, 200), tokenizer, 24)
    one, other = (collator([row for row in rows if row["length"] == 24][start : start + 50]) for start in (0, 50))
    assert not torch.equal(one["labels"] != -100, other["labels"] != -100)


def test_padding_collator(tokenizer: Any) -> None:
    rows = [{"input_ids": [2, 5, 3], "length": 3, "labels": 1}, {"input_ids": [2, 3], "length": 2, "labels": 0}]
    batch = PaddingCollator(tokenizer)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch["labels"].dtype is torch.int64
    assert PaddingCollator(tokenizer)([{**row, "labels": 0.5} for row in rows])["labels"].dtype is torch.float32
