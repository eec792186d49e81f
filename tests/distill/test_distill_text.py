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

from tests.compress.tiny_bert import WORDS, save_bert

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import MaskingCollator, PaddingCollator, load_text, pack  # noqa: E402
from kron_kernels.distill.data.corpus import Corpus, sentence_pairs, sentences  # noqa: E402

WIKITEXT = """\
 = First Title =

 One @-@ two . Three 1 @,@ 000 .

 = = Section = =

 = = = Subsection = = =

 Four = five .

 = Second =

 Six .
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("words") / "bert"))


def documents(*texts: str) -> Any:
    return datasets.Dataset.from_dict({"text": list(texts)})


def numbered(count: int, each: int, length: int = 4) -> Any:
    """Documents of ``each`` sentences, every one of ``length`` times the same word: that of its document."""
    return documents(*("\n".join([" ".join([WORDS[index]] * length)] * each) for index in range(count)))


@pytest.mark.parametrize("packed", [False, True])
def test_blank_lines_separate_documents(packed: bool, tmp_path: Path) -> None:
    text = b"\n\none\ntwo\n\n \nthree = four\n"
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(text) if packed else text)
    assert load_text(path)["text"][:] == ["one\ntwo", "three = four"]


def test_wikitext_headings_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    assert load_text(tmp_path / "wiki.txt")["text"][:] == ["One-two . Three 1,000 .\nFour = five .", "Six ."]


def test_folders_tables_and_several_sources(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "README.md").write_text("not this")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("a1", "a2\nmore")))
    documents("c").rename_column("text", "body").to_parquet(folder / "deep" / "c.parquet")
    assert load_text(folder, text_column="body")["text"][:] == ["a1", "a2\nmore", "b", "c"]
    assert load_text([folder / "b.txt", folder / "b.txt"])["text"][:] == ["b", "b"]


def test_text_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any, split: str) -> Any:
        asked.append((*arguments, split))
        return datasets.Dataset.from_dict({"title": ["x", "y"], "text": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_text("wikimedia/wikipedia:20231101.en", split="train[:10%]")["text"][:] == ["one", "two"]
    assert load_text(["one/data", "other/data"], text_column="title")["text"][:] == ["x", "y", "x", "y"]
    assert asked[:1] == [("wikimedia/wikipedia", "20231101.en", "train[:10%]")]
    with pytest.raises(ValueError, match="wikipedia: expected a column 'body', got title, text"):
        load_text("wikimedia/wikipedia", text_column="body")


def test_text_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"text: expected text, got none in .*blank.txt"):
        load_text(tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("one\né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt, line 2: expected UTF-8 text"):
        load_text(tmp_path / "latin.txt")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a.md", tmp_path / "empty"):
        with pytest.raises(ValueError, match=r"text: expected files of .txt, .jsonl, .parquet, got"):
            load_text(path)
    with pytest.raises(
        FileNotFoundError, match=r"text: expected a folder, a file or a data set's name, got absent.txt"
    ):
        load_text("absent.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: text: expected a string, got 3"):
        load_text(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl: expected a column 'body' for the text, got 'text'"):
        load_text(tmp_path / "a.jsonl", text_column="body")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        OSError, match="text: wikitext is neither a local folder or file nor to be had from the hub: off"
    ):
        load_text("wikitext")


def test_sentences() -> None:
    text = 'He said "No." Then he left! Why? (Nobody knows.) It cost 3.5 dollars\nnext line . Wiki style .'
    assert sentences(text) == [
        'He said "No."',
        "Then he left!",
        "Why?",
        "(Nobody knows.)",
        "It cost 3.5 dollars",
        "next line .",
        "Wiki style .",
    ]


def words_of(rows: Any, tokenizer: Any) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"]]


def test_sequences_are_full_but_for_the_last_of_a_document(tokenizer: Any) -> None:
    texts = ["the cat sees a dog\n\nand a bird likes the red dog", "", "a small cat"]
    rows = pack(documents(*texts), tokenizer, 8)
    assert words_of(rows, tokenizer) == [
        ["[CLS]", "the", "cat", "sees", "a", "dog", "and", "[SEP]"],
        ["[CLS]", "a", "bird", "likes", "the", "red", "dog", "[SEP]"],
        ["[CLS]", "a", "small", "cat", "[SEP]"],
    ]
    assert rows["length"][:] == [8, 8, 5]
    assert rows["token_type_ids"][2] == [0] * 5
    assert rows.column_names == ["input_ids", "token_type_ids", "length"]
    assert not rows.cache_files


def test_sequences_across_documents(tokenizer: Any) -> None:
    rows = pack(documents("the cat sees a dog", "a bird", "cat"), tokenizer, 8, across_documents=True)
    assert words_of(rows, tokenizer) == [
        ["[CLS]", "the", "cat", "sees", "a", "dog", "[SEP]", "[SEP]"],
        ["[CLS]", "a", "bird", "[SEP]", "cat", "[SEP]"],
    ]


def test_many_batches_of_documents_keep_their_order(tokenizer: Any) -> None:
    texts = [f"{WORDS[index % 14]} {WORDS[index // 14 % 14]}" for index in range(600)]
    seen: list[tuple[int, int, str]] = []
    rows = pack(documents(*texts), tokenizer, 8, progress=lambda *step: seen.append(step))
    assert seen == [(256, 600, "documents"), (512, 600, "documents"), (600, 600, "documents")]
    assert [" ".join(words[1:-1]) for words in words_of(rows, tokenizer)] == texts


def segments(row: dict[str, Any], tokenizer: Any) -> tuple[list[str], list[str]]:
    """The words of A and of B of a row, whose form is checked."""
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert (words[0], words[-1], words.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    middle = words.index("[SEP]")
    assert row["token_type_ids"] == [0] * (middle + 1) + [1] * (len(words) - middle - 1)
    assert row["length"] == len(words)
    return words[1:middle], words[middle + 1 : -1]


def test_pairs_follow_each_other_or_come_from_different_documents(tokenizer: Any) -> None:
    rows = pack(numbered(14, 200), tokenizer, 24, next_sentence=True)
    for row in rows:
        a, b = segments(row, tokenizer)
        assert len(a) + len(b) <= 21
        assert min(len(a), len(b)) >= 1
        assert len(set(a)) == len(set(b)) == 1
        assert (set(a) == set(b)) == (row["next_sentence_label"] == 0)
    labels = rows["next_sentence_label"][:]
    assert len(labels) > 500
    assert abs(sum(labels) / len(labels) - 0.5) < 0.06


def test_every_sentence_is_used_once_as_a_or_its_continuation(tokenizer: Any) -> None:
    # Three sentences fill the room, so that nothing is cut off.
    text = [f"{left} {right} cat" for left in WORDS for right in WORDS]
    rows = pack(documents("\n".join(text), "\n".join(["the a dog"] * 3)), tokenizer, 12, next_sentence=True)
    first: list[str] = []
    for row in rows:
        a, b = segments(row, tokenizer)
        first += a + (b if row["next_sentence_label"] == 0 else [])
    assert " ".join(first).startswith(" ".join(text))


def test_b_is_as_long_as_the_continuation_from_wherever_it_comes() -> None:
    # Two documents of 30 sentences, each a token that is its own place.
    corpus = Corpus(np.arange(60, dtype=np.int32), np.arange(61), np.array([0, 30, 60]))
    for seed in range(20):
        for a, b, follows in sentence_pairs(corpus, 20, seed):
            first, cut = int(a[0]), int(a[-1]) + 1
            end = 30 if first < 30 else 60
            last = min(end, first + 20)
            assert len(b) == (last - cut if last - first > 1 else 1)
            assert np.array_equal(b, np.arange(b[0], b[0] + len(b)))
            assert (b[0] == cut) if follows else (b[-1] < 30) != (first < 30)


def test_lengths_tell_nothing_about_the_label(tokenizer: Any) -> None:
    # Short documents among long ones, which could give a longer B than the continuation.
    texts = [*numbered(14, 50)["text"][:], *numbered(14, 2)["text"][:] * 40]
    rows = pack(documents(*texts), tokenizer, 24, next_sentence=True, seed=3)
    rows = rows.filter(lambda row: row["length"] < 24, keep_in_memory=True)
    mean = {
        label: sum(row["length"] for row in rows if row["next_sentence_label"] == label)
        / rows["next_sentence_label"][:].count(label)
        for label in (0, 1)
    }
    assert abs(mean[0] - mean[1]) < 0.5


def test_single_sentences_are_made_up_for(tokenizer: Any) -> None:
    # Half of the documents are single sentences: such a pair cannot be a continuation.
    texts = [*numbered(14, 9)["text"][:], *numbered(14, 1)["text"][:]] * 40
    labels = pack(documents(*texts), tokenizer, 24, next_sentence=True)["next_sentence_label"][:]
    assert abs(sum(labels) / len(labels) - 0.5) < 0.06


def test_long_sentences_are_cut_to_fit(tokenizer: Any) -> None:
    texts = [" ".join([WORDS[index]] * 40) + "\n" + " ".join([WORDS[index + 1]] * 30) for index in range(10)]
    followers = 0
    for row in pack(documents(*texts), tokenizer, 16, next_sentence=True):
        a, b = segments(row, tokenizer)
        assert len(a) + len(b) == 13
        assert min(len(a), len(b)) == 6
        followers += row["next_sentence_label"] == 0
    assert followers > 0


def test_pairs_are_seeded(tokenizer: Any) -> None:
    text = numbered(10, 9)
    first, same, other = (pack(text, tokenizer, 24, next_sentence=True, seed=seed)[:] for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["the cat"], {"seq_len": 7}, "seq_len: expected at least 8, got 7"),
        (["the"], {"next_sentence": True, "across_documents": True}, "across_documents: expected False for pairs of"),
        (["", " "], {}, "documents: expected text, got 2 documents without any"),
        (
            ["the\ncat"],
            {"next_sentence": True},
            "next_sentence: expected at least two documents, and one of .* got 1 with 2",
        ),
        (
            ["the", "cat"],
            {"next_sentence": True},
            "next_sentence: expected at least two documents, .* got 2 with 2 sent",
        ),
    ],
)
def test_what_cannot_be_packed(texts: list[str], options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        pack(documents(*texts), tokenizer, **options)


def test_packing_needs_the_special_tokens() -> None:
    class Plain:
        cls_token_id = sep_token_id = None

    with pytest.raises(ValueError, match=r"tokenizer: expected one with \[CLS\] and \[SEP\], got Plain without"):
        pack(documents("the"), Plain())


def test_masks(tokenizer: Any) -> None:
    rows = pack(numbered(14, 200), tokenizer, 24, next_sentence=True)
    examples = [rows[index] for index in range(400)]
    batch = MaskingCollator(tokenizer, seed=5)(examples)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label"}
    assert batch["next_sentence_label"].tolist() == [row["next_sentence_label"] for row in examples]
    longest = max(row["length"] for row in examples)
    assert all(
        batch[name].shape == (400, longest) for name in ("input_ids", "token_type_ids", "attention_mask", "labels")
    )
    plain = torch.full((400, longest), tokenizer.pad_token_id)
    for index, row in enumerate(examples):
        plain[index, : row["length"]] = torch.tensor(row["input_ids"])
    chosen = batch["labels"] != -100
    special = torch.isin(plain, torch.tensor([tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]))
    assert not (chosen & special).any()
    assert torch.equal(batch["attention_mask"] == 0, plain == tokenizer.pad_token_id)
    assert torch.equal(batch["labels"][chosen], plain[chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain[~chosen])
    share = chosen.sum() / (~special).sum()
    assert 0.13 < share < 0.17
    masked = batch["input_ids"][chosen] == tokenizer.mask_token_id
    changed = (batch["input_ids"] != plain)[chosen] & ~masked
    # A tenth, less those replaced by chance by themselves or [MASK].
    assert 0.76 < masked.float().mean() < 0.84
    assert 0.06 < changed.float().mean() < 0.12


def test_unknown_words_may_be_masked(tokenizer: Any) -> None:
    rows = pack(documents(" ".join(["strange"] * 300)), tokenizer, 302)
    assert (MaskingCollator(tokenizer)([rows[0]])["labels"] == tokenizer.unk_token_id).any()


def test_masks_depend_on_the_batch_and_the_seed_alone(tokenizer: Any) -> None:
    """A resumed run skips batches: what a collator was given before must not matter."""
    rows = pack(numbered(14, 20), tokenizer, 24)
    examples = [rows[index] for index in range(8)]
    collator = MaskingCollator(tokenizer, seed=1)
    first = collator(examples)
    assert torch.equal(collator(examples)["input_ids"], first["input_ids"])
    assert torch.equal(MaskingCollator(tokenizer, seed=1)(examples)["labels"], first["labels"])
    assert not torch.equal(MaskingCollator(tokenizer, seed=2)(examples)["labels"], first["labels"])
    assert not torch.equal(collator(examples[::-1])["labels"].flip(0), first["labels"])


def test_padding_collator(tokenizer: Any) -> None:
    rows = [{"input_ids": [2, 5, 3], "length": 3, "labels": 1}, {"input_ids": [2, 3], "length": 2, "labels": 0}]
    batch = PaddingCollator(tokenizer)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch["labels"].dtype is torch.int64
    scores = PaddingCollator(tokenizer)([{**row, "labels": 0.5} for row in rows])["labels"]
    assert scores.dtype is torch.float32


def test_a_model_takes_the_batches(tokenizer: Any) -> None:
    config = transformers.BertConfig(vocab_size=19, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    config.num_hidden_layers = 1
    rows = pack(numbered(14, 20), tokenizer, 24, next_sentence=True)
    batch = MaskingCollator(tokenizer)([rows[index] for index in range(4)])
    loss = transformers.BertForPreTraining(config)(**batch).loss
    assert torch.isfinite(loss)
