"""Extractive question answering as in SQuAD (Rajpurkar et al., 2016, 2018): windows, answers from logits, scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import ArrayLike, NDArray
from torchmetrics.functional.text import squad


def window_sizes(max_length: int) -> tuple[int, int]:
    """``doc_stride`` and ``max_question_length`` of windows of that length: BERT's 128 and 64 where there is room."""
    return min(128, max_length // 3), min(64, max_length // 3)


def qa_features(
    questions: datasets.Dataset,
    tokenizer: Any,
    max_length: int = 384,
    doc_stride: int = 128,
    *,
    max_question_length: int = 64,
    training: bool = True,
) -> datasets.Dataset:
    """Windows ``[CLS] question [SEP] part of the context [SEP]`` of at most ``max_length`` tokens, without padding.

    Columns: ``input_ids``, ``token_type_ids`` and ``attention_mask`` (lists of ``length`` integers) and ``length``. For
    training also ``start_positions`` and ``end_positions``, the first and last token of the first answer, 0 ([CLS])
    where the window does not hold all of it. Otherwise ``example``, the row in ``questions``, and ``offsets``, a pair
    of characters in the context (from, to) for each token, (-1, -1) outside of the context.

    Args:
        questions: rows as of ``load_task`` for question answering.
        tokenizer: a fast tokenizer with [CLS] first.
        max_length: the most tokens of a window.
        doc_stride: tokens that a window shares with the one before it.
        max_question_length: tokens that longer questions are cut to.
        training: make positions of answers; otherwise what :func:`best_answers` needs.

    Raises ValueError for a slow tokenizer, lengths that leave no room, and an answer outside of its context.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: expected a fast one, which gives characters, got {type(tokenizer).__name__}")
    room = max_length - max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if max_question_length < 1 or not 0 <= doc_stride < room:
        raise ValueError(
            f"max_length: expected room for a question of {max_question_length} tokens and more than doc_stride = "
            f"{doc_stride} of the context, got {max_length}"
        )

    def windows(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        tokens = tokenizer(
            _cut(batch["question"], tokenizer, max_question_length),
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_attention_mask=True,
        )
        columns: dict[str, list[Any]] = {
            name: tokens[name] for name in ("input_ids", "token_type_ids", "attention_mask")
        }
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        spans = [
            (
                _character_span(batch["context"][index], batch["answers"][index], batch["id"][index])
                if training
                else None
            )
            for index in range(len(rows))
        ]
        more: dict[str, list[Any]] = defaultdict(list)
        for window, index in enumerate(tokens["overflow_to_sample_mapping"]):
            offsets = np.array(tokens["offset_mapping"][window], np.int32)
            offsets[[part != 1 for part in tokens.sequence_ids(window)]] = -1
            if training:
                start, end = _token_span(offsets, spans[index])
                more["start_positions"].append(start)
                more["end_positions"].append(end)
            else:
                more["example"].append(rows[index])
                more["offsets"].append(offsets)
        return {**columns, **more}

    return questions.map(
        windows,
        batched=True,
        with_indices=True,
        remove_columns=questions.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def best_answers(
    questions: datasets.Dataset,
    features: datasets.Dataset,
    start_logits: Sequence[ArrayLike],
    end_logits: Sequence[ArrayLike],
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    no_answer: bool = False,
    null_threshold: float = 0.0,
) -> dict[str, str]:
    """The answer to each question, by its id: the span of the greatest start logit + end logit in all of its windows.

    Args:
        questions: the rows that ``features`` were made from.
        features: :func:`qa_features` with ``training=False``.
        start_logits: of each window (length,), or longer with padding at the end.
        end_logits: likewise.
        n_best: starts and ends of a window to combine.
        max_answer_length: the most tokens of an answer.
        no_answer: answer "" where the logits of [CLS], their least sum over the windows, beat the best span's by more
            than ``null_threshold``.
        null_threshold: see ``no_answer``.

    A question without a possible span gets "". Raises ValueError for as many logits as there are not windows, logits
    shorter than their window, and logits that are not finite.
    """
    for name, logits in (("start_logits", start_logits), ("end_logits", end_logits)):
        if len(logits) != len(features):
            raise ValueError(f"{name}: expected those of {len(features)} windows, got {len(logits)}")
    ids, contexts = questions["id"], questions["context"]
    best = [(-np.inf, 0, 0)] * len(questions)
    null = [np.inf] * len(questions)
    for window, row in enumerate(features):
        offsets = np.array(row["offsets"]).reshape(-1, 2)
        start = _window_logits("start_logits", start_logits[window], window, len(offsets))
        end = _window_logits("end_logits", end_logits[window], window, len(offsets))
        example = row["example"]
        null[example] = min(null[example], float(start[0] + end[0]))
        found = _best_span(start, end, offsets, n_best, max_answer_length)
        best[example] = max(best[example], found, key=lambda span: span[0])
    answers = {}
    for identity, context, (score, begin, stop), null_score in zip(ids, contexts, best, null, strict=True):
        nothing = no_answer and null_score - score > null_threshold
        answers[identity] = "" if nothing else context[begin:stop]
    return answers


def squad_scores(answers: Mapping[str, str], references: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Exact match and F1 in percent, each question's best over its reference answers.

    Where there is none, as in SQuAD 2.0, the empty answer counts as the reference.

    Args:
        answers: texts by the ids of their questions.
        references: mappings with ``id`` and ``answers``, whose ``text`` is a list.

    Raises ValueError for no references, repeated ids, and answers whose ids are not those of the references.
    """
    targets = [
        {"id": row["id"], "answers": {"text": list(row["answers"]["text"]) or [""], "answer_start": []}}
        for row in references
    ]
    known = {target["id"] for target in targets}
    if not targets or len(known) < len(targets):
        raise ValueError(f"references: expected distinct ids, got {len(known)} in {len(targets)} questions")
    if different := known.symmetric_difference(answers):
        raise ValueError(
            f"answers: expected those of {len(known)} questions, got {len(answers)}; {min(different)!r} is in one alone"
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


def _character_span(context: str, answers: Mapping[str, Any], identity: str) -> tuple[int, int] | None:
    """Characters (from, to) of the first answer, without white space around it; None without an answer."""
    if not answers["text"]:
        return None
    text, start = answers["text"][0], answers["answer_start"][0]
    if start < 0 or start + len(text) > len(context) or not text.strip():
        raise ValueError(
            f"answers: expected a text within the {len(context)} characters of the context of question {identity!r}, "
            f"got {text!r} at {start}"
        )
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def _token_span(offsets: NDArray[np.int32], span: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token of a span of characters; (0, 0) if the window, of ``offsets`` (length, 2), lacks a part."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if span is None or not len(inside):
        return 0, 0
    begins, ends = offsets[inside, 0], offsets[inside, 1]
    if begins[0] > span[0] or ends[-1] < span[1]:
        return 0, 0
    start = int(np.searchsorted(begins, span[0], side="right")) - 1
    end = int(np.searchsorted(ends, span[1], side="left"))
    return int(inside[0]) + start, int(inside[0]) + end


def _window_logits(name: str, logits: ArrayLike, window: int, length: int) -> NDArray[np.float64]:
    values = np.asarray(logits, np.float64)
    if values.ndim != 1 or len(values) < length:
        raise ValueError(f"{name}: expected at least {length} values for window {window}, got shape {values.shape}")
    if not np.isfinite(values[:length]).all():
        raise ValueError(f"{name}: expected finite values, got others in window {window}")
    return values[:length]


def _best_span(
    start: NDArray[np.float64], end: NDArray[np.float64], offsets: NDArray[Any], n_best: int, longest: int
) -> tuple[float, int, int]:
    """Score and characters (from, to) of a window's best span."""
    inside = offsets[:, 0] >= 0
    starts = np.argsort(np.where(inside, -start, np.inf), kind="stable")[:n_best]
    ends = np.argsort(np.where(inside, -end, np.inf), kind="stable")[:n_best]
    first, last = starts[:, None], ends[None, :]
    possible = inside[first] & inside[last] & (first <= last) & (last < first + longest)
    scores = np.where(possible, start[first] + end[last], -np.inf)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    if not possible[row, column]:
        return -np.inf, 0, 0
    return float(scores[row, column]), int(offsets[starts[row], 0]), int(offsets[ends[column], 1])
