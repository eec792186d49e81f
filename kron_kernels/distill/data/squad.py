"""Extractive question answering as in SQuAD (Rajpurkar et al., 2016, 2018): windows, answers from logits, scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray
from torchmetrics.functional.text import squad

from .files import mapped

N_BEST, MAX_ANSWER_LENGTH = 20, 30


def qa_features(
    questions: datasets.Dataset, tokenizer: Any, max_length: int = 384, *, training: bool = True
) -> datasets.Dataset:
    """Cut contexts into windows ``[CLS] question [SEP] part of the context [SEP]`` of at most ``max_length`` tokens.

    A window shares BERT's 128 tokens with the one before it and questions are cut to 64, or to a third of
    ``max_length`` each where that is less. Columns: ``input_ids``, ``token_type_ids`` and ``attention_mask`` (lists of
    ``length`` integers) and ``length``. For training also ``start_positions`` and ``end_positions``, the first and last
    token of the first answer, 0 ([CLS]) where the window does not hold all of it. Otherwise ``example``, the row in
    ``questions``, and ``offsets``, a pair of characters in the context (from, to) for each token, (-1, -1) outside.

    Args:
        questions: rows as of ``load_task`` for question answering.
        tokenizer: a fast tokenizer with [CLS] first.
        max_length: the most tokens of a window, at least 12.
        training: make positions of answers; otherwise what :func:`best_answers` needs.

    Raises ValueError for a slow tokenizer and lengths that leave no room.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: expected a fast one, which gives characters, got {type(tokenizer).__name__}")
    stride, question_length = min(128, max_length // 3), min(64, max_length // 3)
    if max_length < 12:
        raise ValueError(f"max_length: expected at least 12 for question answering, got {max_length}")

    def windows(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        tokens = tokenizer(
            _cut(batch["question"], tokenizer, question_length),
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        columns = {name: tokens[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        more: dict[str, list[Any]] = defaultdict(list)
        for window, index in enumerate(tokens["overflow_to_sample_mapping"]):
            more["length"].append(len(tokens["input_ids"][window]))
            offsets = np.array(tokens["offset_mapping"][window], np.int32)
            offsets[[part != 1 for part in tokens.sequence_ids(window)]] = -1
            if training:
                start, end = _token_span(offsets, batch["answers"][index])
                more["start_positions"].append(start)
                more["end_positions"].append(end)
            else:
                more["example"].append(rows[index])
                more["offsets"].append(offsets)
        return {**columns, **more}

    return mapped(questions, windows, with_indices=True)


def best_answers(
    questions: datasets.Dataset,
    features: datasets.Dataset,
    start_logits: Sequence[ArrayLike],
    end_logits: Sequence[ArrayLike],
    *,
    no_answer: bool = False,
) -> dict[str, str]:
    """Find the answer to each question, by its id: the span of the greatest start + end logit in all of its windows.

    A span has at most ``MAX_ANSWER_LENGTH`` tokens and joins the ``N_BEST`` starts and ends of a window. A question
    without a possible span gets "".

    Args:
        questions: the rows that ``features`` were made from.
        features: :func:`qa_features` with ``training=False``.
        start_logits: of each window (length,), or longer with padding at the end.
        end_logits: likewise.
        no_answer: answer "" where the logits of [CLS], their least sum over the windows, beat the best span's.

    Raises ValueError for logits that are not finite.
    """
    best = [(-np.inf, 0, 0)] * len(questions)
    null = [np.inf] * len(questions)
    for window, row in enumerate(features):
        offsets = np.array(row["offsets"]).reshape(-1, 2)
        start, end = (np.asarray(each[window], np.float64)[: len(offsets)] for each in (start_logits, end_logits))
        if not (np.isfinite(start).all() and np.isfinite(end).all()):
            raise ValueError(f"logits: expected finite values, got others in window {window}")
        example = row["example"]
        null[example] = min(null[example], float(start[0] + end[0]))
        best[example] = max(best[example], _best_span(start, end, offsets), key=lambda span: span[0])
    return {
        identity: "" if no_answer and null_score > score else context[begin:stop]
        for identity, context, (score, begin, stop), null_score in zip(
            questions["id"], questions["context"], best, null, strict=True
        )
    }


def squad_scores(answers: Mapping[str, str], references: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Compute exact match and F1 in percent, each question's best over its reference answers.

    Where there is none, as in SQuAD 2.0, the empty answer counts as the reference.

    Args:
        answers: texts by the ids of their questions.
        references: mappings with ``id`` and ``answers``, whose ``text`` is a list.

    Raises ValueError for repeated ids, and answers whose ids are not those of the references.
    """
    targets = [
        {"id": row["id"], "answers": {"text": list(row["answers"]["text"]) or [""], "answer_start": []}}
        for row in references
    ]
    known = {target["id"] for target in targets}
    if not targets or len(known) < len(targets) or known != set(answers):
        raise ValueError(
            f"answers: expected one for each of {len(targets)} questions with distinct ids, got {len(answers)}"
        )
    scores = squad([{"id": name, "prediction_text": text} for name, text in answers.items()], targets)
    return {name: float(scores[name]) for name in ("exact_match", "f1")}


def _cut(questions: Sequence[str], tokenizer: Any, most: int) -> list[str]:
    """The questions, without white space before them, cut to ``most`` tokens."""
    texts = [question.lstrip() for question in questions]
    tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [
        text[: offsets[most - 1][1]] if len(offsets) > most else text
        for text, offsets in zip(texts, tokens, strict=True)
    ]


def _token_span(offsets: NDArray[np.int32], answers: Mapping[str, Any]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) if the window, of ``offsets`` (length, 2), lacks a part."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not answers["text"] or not len(inside):
        return 0, 0
    text, begin = answers["text"][0], answers["answer_start"][0]
    first, last = begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())
    begins, ends = offsets[inside, 0], offsets[inside, 1]
    if begins[0] > first or ends[-1] < last:
        return 0, 0
    start = int(np.searchsorted(begins, first, side="right")) - 1
    end = int(np.searchsorted(ends, last, side="left"))
    return int(inside[0]) + start, int(inside[0]) + end


def _best_span(start: NDArray[np.float64], end: NDArray[np.float64], offsets: NDArray[Any]) -> tuple[float, int, int]:
    """Score and characters (from, to) of a window's best span."""
    inside = offsets[:, 0] >= 0
    starts, ends = (np.argsort(np.where(inside, -each, np.inf), kind="stable")[:N_BEST] for each in (start, end))
    first, last = starts[:, None], ends[None, :]
    possible = inside[first] & inside[last] & (first <= last) & (last < first + MAX_ANSWER_LENGTH)
    scores = np.where(possible, start[first] + end[last], -np.inf)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    if not possible[row, column]:
        return -np.inf, 0, 0
    return float(scores[row, column]), int(offsets[starts[row], 0]), int(offsets[ends[column], 1])
