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
import pyarrow as pa
import torch
import transformers
from numpy.typing import NDArray

from .corpus import (
    Corpus,
    Progress,
    lines,
    sentence_pairs,
    sentences,
    tokenize_corpus,
)
from .sources import hub_name, load_hub
from .tables import (
    column,
    read_jsonl,
    read_lines,
    read_parquet,
    strings,
    suffix,
)

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
# WikiText: " = Title = " opens a document, " = = Section = = " a section of it.
_TITLE = re.compile(r"\s*= [^=\s].* =\s*")
_SECTION = re.compile(r"\s*= (= )+.* (= )*=\s*")
_WIKITEXT_JOINS = re.compile(r" @([-,.])@ ")


def load_text(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    text_column: str = "text",
    split: str = "train",
) -> datasets.Dataset:
    """Documents of a corpus: one column ``text``, a document a row, its lines separated by line feeds.

    In text files blank lines separate documents. A file with WikiText's headings is separated at its titles instead;
    headings are left out there, and " @-@ ", " @,@ " and " @.@ " become plain characters again. In tables each row is a
    document.

    Args:
        source: files and folders (all their files of these kinds, in the order of their paths): .txt, .jsonl, .parquet,
            the first two also with .gz; or the name of a data set on the hub, with ``:configuration`` where it has
            several.
        text_column: the column of a table that holds the text.
        split: the part of a data set on the hub, such as "train[:10%]".

    Raises:
        OSError: a source that is not there, or that could not be downloaded.
        ValueError: no text, a file of another kind, not UTF-8, malformed, or without the column.
    """
    given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    documents: list[str] = []
    parts: list[datasets.Dataset] = []
    for each in given:
        path = Path(each)
        if path.exists():
            for file in _files(path):
                documents.extend(_documents(file, text_column))
        else:
            rows = load_hub("text", hub_name("text", each), split=split)
            if text_column not in rows.column_names:
                raise ValueError(f"{each}: expected a column {text_column!r}, got {', '.join(rows.column_names)}")
            rows = rows.select_columns([text_column])
            parts.append(rows if text_column == "text" else rows.rename_column(text_column, "text"))
    if documents:
        parts.insert(0, datasets.Dataset.from_dict({"text": documents}))
    if not any(map(len, parts)):
        raise ValueError(f"text: expected text, got none in {', '.join(map(str, given))}")
    return datasets.concatenate_datasets(parts)


def pack(
    documents: datasets.Dataset,
    tokenizer: Any,
    seq_len: int = 512,
    *,
    next_sentence: bool = False,
    across_documents: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> datasets.Dataset:
    """Sequences of at most ``seq_len`` tokens, special tokens included, from documents of :func:`load_text`.

    For masked LM alone: ``[CLS] text [SEP]``, where each document is cut every ``seq_len - 2`` tokens, so that only its
    last sequence is shorter. With ``next_sentence``: ``[CLS] A [SEP] B [SEP]`` (:func:`~.corpus.sentence_pairs`).

    Columns: ``input_ids`` (int32) and ``token_type_ids`` (int8; 1 for B and its [SEP]), lists of ``length`` integers;
    ``length``; with ``next_sentence`` also ``next_sentence_label``, 0 where B follows A and 1 where it does not, as
    transformers has it. The data are in memory, 5 bytes a token. There is no attention mask: the collator adds it.

    Args:
        documents: a Dataset with a column ``text``.
        tokenizer: a tokenizer with [CLS] and [SEP].
        seq_len: the most tokens of a sequence.
        next_sentence: make pairs of segments; the corpus needs two documents and one of several sentences.
        across_documents: run on into the next document after a [SEP], so that only the very last sequence is shorter.
        seed: of the pairs.
        progress: called as ``progress(done, total, what)`` while the documents are tokenized.

    Raises ValueError for arguments that do not fit the text or one another.
    """
    if seq_len < 8:
        raise ValueError(f"seq_len: expected at least 8, got {seq_len}")
    if next_sentence and across_documents:
        raise ValueError("across_documents: expected False for pairs of segments (next_sentence), got True")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError(f"tokenizer: expected one with [CLS] and [SEP], got {type(tokenizer).__name__} without")
    corpus = tokenize_corpus(documents, tokenizer, sentences if next_sentence else lines, progress)
    if not len(corpus.tokens):
        raise ValueError(f"documents: expected text, got {len(documents)} documents without any")
    cls, sep = (np.array([token], np.int32) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    if next_sentence:
        return _pack_pairs(corpus, cls, sep, seq_len, seed)
    texts: Iterator[NDArray[np.int32]] = (corpus.document(index) for index in range(len(corpus.documents) - 1))
    if across_documents:
        texts = iter([np.concatenate([part for text in texts for part in (text, sep)])[:-1]])
    room = seq_len - 2
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for text in texts:
        for start in range(0, len(text), room):
            piece = text[start : start + room]
            pieces += (cls, piece, sep)
            lengths.append(len(piece) + 2)
    ids = np.concatenate(pieces)
    return _dataset(ids, np.zeros(len(ids), np.int8), lengths)


def _pack_pairs(
    corpus: Corpus, cls: NDArray[np.int32], sep: NDArray[np.int32], seq_len: int, seed: int
) -> datasets.Dataset:
    count = len(corpus.documents) - 1
    if count < 2 or int(np.diff(corpus.documents).max()) < 2:
        raise ValueError(
            f"next_sentence: expected at least two documents, and one of several sentences, got {count} with "
            f"{len(corpus.sentences) - 1} sentences"
        )
    pieces: list[NDArray[np.int32]] = []
    spans: list[int] = []
    lengths: list[int] = []
    labels: list[int] = []
    for a, b, follows in sentence_pairs(corpus, seq_len - 3, seed):
        pieces += (cls, a, sep, b, sep)
        spans += (len(a) + 2, len(b) + 1)
        lengths.append(len(a) + len(b) + 3)
        labels.append(0 if follows else 1)
    types = np.repeat(np.tile(np.array([0, 1], np.int8), len(labels)), spans)
    return _dataset(np.concatenate(pieces), types, lengths, labels)


def _dataset(
    ids: NDArray[np.int32], types: NDArray[np.int8], lengths: list[int], labels: list[int] | None = None
) -> datasets.Dataset:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    columns = {
        "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        "token_type_ids": pa.LargeListArray.from_arrays(offsets, pa.array(types)),
        "length": pa.array(lengths, pa.int32()),
    }
    if labels is not None:
        columns["next_sentence_label"] = pa.array(labels, pa.int64())
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)))


class MaskingCollator(transformers.DataCollatorForLanguageModeling):
    """Padded batches for masked LM, masked anew wherever other sequences come together.

    Of 15 % of the tokens, those to predict, 80 % become [MASK], 10 % a random token, and 10 % stay.

    A batch holds ``input_ids``, ``token_type_ids``, ``attention_mask`` and ``labels``, each (sequences, length) int64,
    labels -100 where there is nothing to predict; and ``next_sentence_label`` (sequences,) if the data have it.
    [CLS], [SEP] and padding are never masked, [UNK] may be.

    Args:
        tokenizer: a tokenizer with [MASK], [CLS], [SEP] and [PAD].
        seed: of the masks; the same batch gets the same masks, whatever came before it.
        probability: the share of tokens to predict.
    """

    def __init__(self, tokenizer: Any, seed: int = 0, probability: float = 0.15) -> None:
        super().__init__(tokenizer, mlm_probability=probability)
        self._seed = seed
        special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
        self._special = torch.tensor(special)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """The batch of these rows of :func:`pack`."""
        return super().torch_call([without_length(example) for example in examples])

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[Any, Any]:
        """Masked ids and labels of the ids ``inputs`` (sequences, length)."""
        if special_tokens_mask is None:
            special_tokens_mask = torch.isin(inputs, self._special)
        # A run that is resumed skips batches without collating them: what came before must not matter.
        self.generator = torch.Generator().manual_seed(zlib.crc32(inputs.numpy().tobytes(), self._seed))
        return super().torch_mask_tokens(inputs, special_tokens_mask, offset_mapping)


class PaddingCollator(transformers.DataCollatorWithPadding):
    """Padded batches of the rows of ``encode`` and ``qa_features``, without their ``length``."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these rows; labels are int64 for classes and positions, float32 for scores."""
        return super().__call__([without_length(feature) for feature in features])


def without_length(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what only the sampler needs."""
    return {name: value for name, value in row.items() if name != "length"}


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.rglob("*") if suffix(file) in TEXT_SUFFIXES) if path.is_dir() else [path]
    if not files or suffix(files[0]) not in TEXT_SUFFIXES:
        raise ValueError(f"text: expected files of {', '.join(TEXT_SUFFIXES)}, got {path}")
    return files


def _documents(path: Path, text_column: str) -> Iterator[str]:
    kind = suffix(path)
    if kind != ".txt":
        table = read_jsonl(path) if kind == ".jsonl" else read_parquet(path)
        yield from strings(table, column(table, (text_column,), "text"), "text")
        return
    rows = [line.strip() for _, line in read_lines(path)]
    wikitext = any(map(_TITLE.fullmatch, rows))
    document: list[str] = []
    for row in [*rows, ""]:
        ends = _TITLE.fullmatch(row) if wikitext else not row
        if ends:
            if document:
                yield "\n".join(document)
            document = []
        elif row and not (wikitext and _SECTION.fullmatch(row)):
            document.append(_WIKITEXT_JOINS.sub(r"\1", row) if wikitext else row)
    if document:
        yield "\n".join(document)
