"""A tokenized corpus in three arrays, and pairs of segments from it for next-sentence prediction."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int, int, str], None]
_BATCH = 256
_DRAWS = 10  # of another document, for one that is long enough
# A rough rule: a full stop, perhaps a closing quote or bracket, white space, a capital. "Dr. No" is split, too.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')]))\s+(?=["'(]*\s?[A-Z])""")


@dataclass(frozen=True)
class Corpus:
    """Token ids of documents one after another.

    ``tokens`` (N,) int32; ``sentences`` (S + 1,) int64, the first token of each sentence, and N; ``documents`` (D + 1,)
    int64, the first sentence of each document, and S. No sentence and no document is empty.
    """

    tokens: NDArray[np.int32]
    sentences: NDArray[np.int64]
    documents: NDArray[np.int64]

    def document(self, index: int) -> NDArray[np.int32]:
        """Tokens of a document."""
        first, end = self.documents[index : index + 2]
        return self.tokens[self.sentences[first] : self.sentences[end]]


def lines(text: str) -> list[str]:
    """The lines of a document that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a document: its lines, split where one seems to end."""
    return [piece for line in lines(text) for piece in _SENTENCE_END.split(line.strip())]


def tokenize_corpus(
    documents: Any, tokenizer: Any, pieces: Callable[[str], list[str]], progress: Progress | None = None
) -> Corpus:
    """The tokens of a Dataset with a column ``text``, a document a row, without special tokens.

    ``pieces`` splits a document into what counts as sentences.
    """
    tokens, sentence_starts, document_starts = array("i"), array("q", [0]), array("q", [0])
    for start in range(0, len(documents), _BATCH):
        texts = [pieces(text) for text in documents[start : start + _BATCH]["text"]]
        if progress is not None:
            progress(start + len(texts), len(documents), "documents")
        flat = [piece for text in texts for piece in text]
        if not flat:
            continue
        encoded = tokenizer(
            flat, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        rows = iter(encoded)
        for text in texts:
            for _ in text:
                if row := next(rows):
                    tokens.fromlist(row)
                    sentence_starts.append(len(tokens))
            if len(sentence_starts) - 1 > document_starts[-1]:
                document_starts.append(len(sentence_starts) - 1)
    return Corpus(
        np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32),
        np.frombuffer(sentence_starts, np.int64),
        np.frombuffer(document_starts, np.int64),
    )


def sentence_pairs(corpus: Corpus, room: int, seed: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], bool]]:
    """Segments A and B, of ``room`` tokens at most together, and whether B follows A: half of the time (Devlin et al.).

    A run of whole sentences that fills the room, or of two, is cut at random. Where B does not follow, it comes from
    another document and is as long as the continuation would have been, if one can be found, so that lengths tell
    nothing; that continuation is used next. A single sentence that is left over takes a B from elsewhere, at most as
    long as itself, and later pairs make up for it. Segments that are too long lose the start of A and the end of B.
    """
    random = np.random.default_rng(seed)
    starts = corpus.sentences
    forced = 0
    for document in range(len(corpus.documents) - 1):
        first, end = map(int, corpus.documents[document : document + 2])
        while first < end:
            # As many sentences as begin within the room, and two at least.
            last = min(end, max(first + 2, int(np.searchsorted(starts, starts[first] + room))))
            follows = last - first > 1 and bool(random.random() < 0.5)
            if last - first == 1:
                cut, length = last, int(starts[last] - starts[first])
                wanted = min(length, max(room - length, room // 2))
                forced += 1
            else:
                cut = int(random.integers(first + 1, last))
                wanted = int(starts[last] - starts[cut])
                # Two more pairs, neither a continuation, would have had one on average.
                if not follows and forced >= 2:
                    follows, forced = True, forced - 2
            a = corpus.tokens[starts[first] : starts[cut]]
            b = corpus.tokens[starts[cut] : starts[last]] if follows else _elsewhere(corpus, document, wanted, random)
            a_length, b_length = _shares(len(a), len(b), room)
            yield a[len(a) - a_length :], b[:b_length], follows
            first = last if follows else cut


def _elsewhere(corpus: Corpus, document: int, wanted: int, random: np.random.Generator) -> NDArray[np.int32]:
    """``wanted`` tokens from the start of a sentence in another document; fewer if those drawn are all shorter."""
    starts, documents = corpus.sentences, corpus.documents
    own = documents[document + 1] - documents[document]
    for _ in range(_DRAWS):
        sentence = int(random.integers(documents[-1] - own))
        sentence += own if sentence >= documents[document] else 0
        other = int(np.searchsorted(documents, sentence, side="right")) - 1
        first, end = documents[other : other + 2]
        if starts[end] - starts[first] >= wanted:
            break
    # Back from the end of the document, if too near to it.
    latest = int(np.searchsorted(starts[first:end], starts[end] - wanted, side="right")) - 1
    start = starts[min(sentence, first + max(latest, 0))]
    return corpus.tokens[start : min(start + wanted, starts[end])]


def _shares(a: int, b: int, room: int) -> tuple[int, int]:
    """Lengths of the segments once the longer one has been cut, as far as needed."""
    if a + b <= room:
        return a, b
    half = room // 2
    if a <= half:
        return a, room - a
    if b <= half:
        return room - b, b
    return room - half, half
