"""Extractive question answering: windows, positions, answers from logits and their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distill import distill_runs

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import best_answers, qa_features, squad_scores  # noqa: E402

WORDS = [*distill_runs.GOOD, *distill_runs.BAD, *distill_runs.NOUNS]  # 14 different words, a token each
CONTEXT = " ".join(WORDS)
# A third of 12 tokens each for the question and what windows share: [CLS] bright kind [SEP] seven words [SEP].
LENGTH, FIRST, HELD, SHARED = 12, 4, 7, 4
NOTHING: dict[str, list[Any]] = {"text": [], "answer_start": []}


def questions(*answers: str | None) -> Any:
    rows = []
    for index, answer in enumerate(answers):
        found = {"text": [answer], "answer_start": [CONTEXT.index(answer)]} if answer else NOTHING
        rows.append({"id": f"q{index}", "question": "bright kind", "context": CONTEXT, "answers": found})
    features = {name: datasets.Value("string") for name in ("id", "question", "context")}
    features["answers"] = {"text": [datasets.Value("string")], "answer_start": [datasets.Value("int32")]}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def test_positions_are_those_of_the_answer_where_a_window_holds_it(tokenizer: Any) -> None:
    for answer, windows in ((WORDS[5], 2), (WORDS[0], 1)):
        rows = qa_features(questions(answer), tokenizer, LENGTH)
        held = 0
        for row in rows:
            words = tokenizer.convert_ids_to_tokens(row["input_ids"])
            assert row["length"] == len(words) <= LENGTH
            assert row["token_type_ids"] == [0] * FIRST + [1] * (len(words) - FIRST)
            place = words.index(answer, FIRST) if answer in words[FIRST:] else 0
            assert (row["start_positions"], row["end_positions"]) == (place, place)
            held += place > 0
        assert held == windows
    assert qa_features(questions(None), tokenizer, LENGTH)["start_positions"][:] == [0] * len(rows)
    with pytest.raises(ValueError, match="max_length: expected at least 12 for question answering, got 11"):
        qa_features(questions("kind"), tokenizer, 11)


def logits_for(features: Any, spans: dict[int, tuple[int, int, float]]) -> tuple[list[Any], list[Any]]:
    """Zeros, with a score at the start and the end of a span of each of these windows."""
    starts, ends = ([np.zeros(length) for length in features["length"]] for _ in range(2))
    for window, (start, end, value) in spans.items():
        starts[window][start] = ends[window][end] = value
    return starts, ends


def test_the_best_span_of_all_windows(tokenizer: Any) -> None:
    rows = questions("kind", "calm")
    features = qa_features(rows, tokenizer, LENGTH, training=False)
    second = features["example"][:].index(1)
    spans = {0: (4, 5, 2.0), 1: (5, 7, 3.0), second: (6, 6, 1.0)}
    starts, ends = logits_for(features, spans)
    answers = best_answers(rows, features, starts, ends)
    step = HELD - SHARED  # a window's first word is that many after the one before
    assert answers == {"q0": " ".join(WORDS[step + 1 : step + 4]), "q1": WORDS[2]}


@pytest.mark.parametrize(("null", "wanted"), [(3.0, WORDS[2]), (5.0, "")])
def test_no_answer(null: float, wanted: str, tokenizer: Any) -> None:
    rows = questions(None)
    features = qa_features(rows, tokenizer, LENGTH, training=False)
    starts, ends = logits_for(features, {0: (6, 6, 2.0)})
    for window, values in enumerate(starts):
        # A window that does not hold the answer says so more clearly: the least counts.
        values[0] = null + 10 * window
    assert best_answers(rows, features, starts, ends, no_answer=True) == {"q0": wanted}
    assert best_answers(rows, features, starts, ends) == {"q0": WORDS[2]}


def test_scores_by_hand() -> None:
    texts = {"a": ["The Red Cat!", "dog"], "b": ["small bird"], "c": [], "d": []}
    references = [
        {"id": name, "answers": {"text": each, "answer_start": [0] * len(each)}} for name, each in texts.items()
    ]
    scores = squad_scores({"a": "red cat", "b": "a small blue bird", "c": "", "d": "y"}, references)
    # b: precision 2/3, recall 1.
    assert scores == pytest.approx({"exact_match": 50.0, "f1": 100 * (2 + 0.8) / 4}, abs=1e-4)
    with pytest.raises(ValueError, match="answers: expected one for each of 4 questions with distinct ids, got"):
        squad_scores({"a": "", "b": "", "x": "", "d": ""}, references)
