"""Text for pre-training distillation: documents, packed sequences and masking (Devlin et al., 2019)."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from .files import load_hub, read_rows, suffix

Tokens = NDArray[np.int32]
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_DRAWS = 10  # of another document, for one that is long enough
# WikiText: " = Title = " opens a document, " = = Section = = " a section of it.
_TITLE = re.compile(r"\s*= [^=\s].* =\s*")
_SECTION = re.compile(r"\s*= (= )+.* (= )*=\s*")
_WIKITEXT_JOINS = re.compile(r" @([-,.])@ ")
# A rough rule: a full stop, perhaps a closing quote or bracket, white space, a capital. "Dr. No" is split, too.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]*\s?[A-Z])""")


def load_text(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], column: str = "text") -> list[str]:
    """Load the documents of a corpus, the lines of each separated by line feeds.

    In text files blank lines separate documents. A file with WikiText's headings is separated at its titles instead;
    headings are left out there, and " @-@ ", " @,@ " and " @.@ " become plain characters again. In tables each row is a
    document.

    Args:
        source: files and folders (all their files of these kinds, in the order of their paths): .txt, .jsonl, .parquet,
            also with .gz; or the name of a data set on the hub, with ``:configuration`` where it has several, whose
            "train" split is read.
        column: the column of a table that holds the text.

    Raises:
        OSError: a source that is not there, or that could not be downloaded.
        ValueError: no text, a file of another kind, damaged, or without the column.
    """
    given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    documents: list[str] = []
    for each in given:
        path = Path(each)
        if not path.exists():
            documents += _texts(str(each), load_hub(each, split="train"), column)
            continue
        files = sorted(file for file in path.rglob("*") if suffix(file) in TEXT_SUFFIXES) if path.is_dir() else [path]
        if not files or suffix(files[0]) not in TEXT_SUFFIXES:
            raise ValueError(f"data: expected files of {', '.join(TEXT_SUFFIXES)}, got {path}")
        for file in files:
            documents += _documents(file) if suffix(file) == ".txt" else _texts(str(file), read_rows(file), column)
    if not any(document.strip() for document in documents):
        raise ValueError(f"data: expected text, got none in {', '.join(map(str, given))}")
    return documents


def pack(
    documents: Sequence[str], tokenizer: Any, seq_len: int = 512, *, next_sentence: bool = False, seed: int = 0
) -> datasets.Dataset:
    """Make sequences of at most ``seq_len`` tokens, special tokens included, from documents of :func:`load_text`.

    For masked LM alone: ``[CLS] text [SEP]``, where each document is cut every ``seq_len - 2`` tokens, so that only its
    last sequence is shorter. With ``next_sentence``: ``[CLS] A [SEP] B [SEP]`` (:func:`sentence_pairs`).

    Columns: ``input_ids`` (int32) and ``token_type_ids`` (int8; 1 for B and its [SEP]), lists of ``length`` integers;
    ``length``; with ``next_sentence`` also ``next_sentence_label``, 0 where B follows A and 1 where it does not, as
    transformers has it. There is no attention mask: the collator adds it.

    Args:
        documents: texts.
        tokenizer: a tokenizer with [CLS] and [SEP].
        seq_len: the most tokens of a sequence.
        next_sentence: make pairs of segments; the corpus needs two documents and one of several sentences.
        seed: of the pairs.

    Raises ValueError for a length or a text that leaves nothing to pack.
    """
    if seq_len < 8:
        raise ValueError(f"max_length: expected at least 8, got {seq_len}")
    split = sentences if next_sentence else _lines
    corpus = [tokens for text in documents if (tokens := _tokenized(split(text), tokenizer))]
    cls, sep = (np.array([token], np.int32) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    columns: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": []}
    if next_sentence:
        if len(corpus) < 2 or max(map(len, corpus)) < 2:
            raise ValueError(
                f"next_sentence: expected at least two documents, and one of several sentences, got {len(corpus)}"
            )
        columns["next_sentence_label"] = []
        for a, b, follows in sentence_pairs(corpus, seq_len - 3, seed):
            columns["input_ids"].append(np.concatenate([cls, a, sep, b, sep]))
            columns["token_type_ids"].append(np.repeat(np.array([0, 1], np.int8), [len(a) + 2, len(b) + 1]))
            columns["next_sentence_label"].append(int(not follows))
    else:
        for document in corpus:
            text = np.concatenate(document)
            for start in range(0, len(text), seq_len - 2):
                ids = np.concatenate([cls, text[start : start + seq_len - 2], sep])
                columns["input_ids"].append(ids)
                columns["token_type_ids"].append(np.zeros(len(ids), np.int8))
    return datasets.Dataset.from_dict({**columns, "length": [len(ids) for ids in columns["input_ids"]]})


def sentence_pairs(corpus: Sequence[Sequence[Tokens]], room: int, seed: int) -> Iterator[tuple[Tokens, Tokens, bool]]:
    """Make segments A and B, of ``room`` tokens at most together, and tell whether B follows A: half of the time.

    As BERT's (Devlin et al., 2019): a run of whole sentences that fills the room is cut at random. Where B does not
    follow, it comes from another document and is as long as the continuation would have been, if one can be found, so
    that lengths tell nothing; that continuation is used next. A single sentence that is left over takes a B from
    elsewhere, and later pairs make up for it. Segments that are too long lose the start of A and the end of B.

    Args:
        corpus: documents of sentences of token ids, two documents at least.
    """
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *map(len, corpus)])  # of documents, in sentences
    forced = 0
    for number, document in enumerate(corpus):
        first = 0
        while first < len(document):
            last, total = first + 1, len(document[first])
            while last < len(document) and (last < first + 2 or total < room):
                total += len(document[last])
                last += 1
            cut = int(random.integers(first + 1, last)) if last - first > 1 else last
            follows = last - first > 1 and bool(random.random() < 0.5)
            if last - first == 1:
                forced += 1
            elif not follows and forced >= 2:
                # Two more pairs, neither a continuation, would have had one on average.
                follows, forced = True, forced - 2
            a, after = np.concatenate(document[first:cut]), sum(map(len, document[cut:last]))
            if follows:
                b = np.concatenate(document[cut:last])
            else:
                wanted = after or min(len(a), max(room - len(a), room // 2))
                for _ in range(_DRAWS):
                    sentence = int(random.integers(starts[-1] - len(document)))
                    sentence += len(document) if sentence >= starts[number] else 0
                    other = int(np.searchsorted(starts, sentence, side="right")) - 1
                    if sum(map(len, corpus[other])) >= wanted:
                        break
                b = _from_sentence(corpus[other], sentence - int(starts[other]), wanted)
            keep = min(len(a), max(room - len(b), room // 2))
            yield a[len(a) - keep :], b[: room - keep], follows
            first = last if follows else cut


def sentences(text: str) -> list[str]:
    """Split a document into sentences: its lines, split where a sentence seems to end."""
    return [piece for line in _lines(text) for piece in _SENTENCE_END.split(line.strip())]


class MaskingCollator(transformers.DataCollatorForLanguageModeling):
    """Pad and mask batches for masked LM: of 15 % of the tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    A batch holds ``input_ids``, ``token_type_ids``, ``attention_mask`` and ``labels``, each (sequences, length) int64,
    labels -100 where there is nothing to predict; and ``next_sentence_label`` (sequences,) if the data have it.
    [CLS], [SEP] and padding are never masked, [UNK] may be. The same batch gets the same masks from one ``seed``,
    whatever came before it: a run that is resumed skips batches without collating them.
    """

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        super().__init__(tokenizer, mlm_probability=0.15)
        self._seed = seed
        self._special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Make the batch of these rows of :func:`pack`."""
        return super().torch_call([_without_length(example) for example in examples])

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[Any, Any]:
        """Mask the ids ``inputs`` (sequences, length); gives masked ids and labels."""
        self.generator = torch.Generator().manual_seed(zlib.crc32(inputs.numpy().tobytes(), self._seed))
        return super().torch_mask_tokens(inputs, torch.isin(inputs, self._special), offset_mapping)


class PaddingCollator(transformers.DataCollatorWithPadding):
    """Pad batches of the rows of ``encode`` and ``qa_features``; labels are int64 for classes, float32 for scores."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Make the batch of these rows, without their ``length``."""
        return super().__call__([_without_length(feature) for feature in features])


def _without_length(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what only the sampler needs."""
    return {name: value for name, value in row.items() if name != "length"}


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _tokenized(pieces: list[str], tokenizer: Any) -> list[Tokens]:
    """The token ids of each piece, without special tokens; pieces without any are left out."""
    if not pieces:
        return []
    ids = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array(each, np.int32) for each in ids if each]


def _from_sentence(document: Sequence[Tokens], start: int, wanted: int) -> Tokens:
    """``wanted`` tokens from the start of a sentence; nearer to the document's start if too few are left."""
    while start and sum(map(len, document[start:])) < wanted:
        start -= 1
    return np.concatenate(document[start:])[:wanted]


def _texts(where: str, rows: Any, column: str) -> list[str]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str):
            raise ValueError(f"{where}, row {number}: expected a column {column!r} with a string, got {str(row)[:60]}")
    return [row[column] for row in rows]


def _documents(path: Path) -> Iterator[str]:
    rows = [row["text"].strip() for row in read_rows(path)]
    wikitext = any(map(_TITLE.fullmatch, rows))
    document: list[str] = []
    for row in [*rows, " = End = " if wikitext else ""]:
        if _TITLE.fullmatch(row) if wikitext else not row:
            if document:
                yield "\n".join(document)
            document = []
        elif row and not (wikitext and _SECTION.fullmatch(row)):
            document.append(_WIKITEXT_JOINS.sub(r"\1", row) if wikitext else row)
