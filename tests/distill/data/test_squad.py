"""Extractive question answering: windows, positions, answers from logits and their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from tests.distill import distill_runs

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import best_answers, qa_features, squad, squad_scores  # noqa: E402

WORDS = [*distill_runs.GOOD, *distill_runs.BAD, *distill_runs.NOUNS]  # 14 different words, a token each
CONTEXT = " ".join(WORDS)
# A third of 12 tokens each for the question and what windows share: [CLS] bright kind [SEP] seven words [SEP].
LENGTH, FIRST, HELD, SHARED = 12, 4, 7, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(distill_runs.save_bert(tmp_path_factory.mktemp("words") / "bert"))


def questions(*answers: str | None, question: str = "bright kind", context: str = CONTEXT) -> Any:
    rows = [
        {
            "id": f"q{index}",
            "question": question,
            "context": context,
            "answers": {
                "text": [] if answer is None else [answer],
                "answer_start": [] if answer is None else [context.index(answer)],
            },
        }
        for index, answer in enumerate(answers)
    ]
    features = {name: datasets.Value("string") for name in ("id", "question", "context")}
    features["answers"] = {"text": [datasets.Value("string")], "answer_start": [datasets.Value("int32")]}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize(("answer", "windows"), [(WORDS[5], 2), (WORDS[0], 1), (CONTEXT[20:40].strip(), None)])
def test_positions_are_those_of_the_answer_where_a_window_holds_it(
    answer: str, windows: int | None, tokenizer: Any
) -> None:
    rows = qa_features(questions(answer), tokenizer, LENGTH)
    held = 0
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert row["length"] == len(words) <= LENGTH
        start, end = row["start_positions"], row["end_positions"]
        if answer in " ".join(words[FIRST:-1]):
            held += 1
            assert answer in " ".join(words[start : end + 1])
            assert start >= FIRST
        elif windows is not None:
            assert (start, end) == (0, 0)
        assert row["token_type_ids"] == [0] * FIRST + [1] * (len(words) - FIRST)
    assert windows in (held, None)
    assert qa_features(questions(None), tokenizer, LENGTH)["start_positions"][:] == [0] * len(rows)


def test_white_space_and_parts_of_words_do_not_mislead(tokenizer: Any) -> None:
    for answer, wanted in ((" kind calm ", ["kind", "calm"]), ("righ", ["bright"])):
        row = qa_features(questions(answer, question="  bright kind calm"), tokenizer, 31)[0]
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert words[row["start_positions"] : row["end_positions"] + 1] == wanted
        assert row["start_positions"] > 4


def test_long_questions_are_cut_and_every_word_of_the_context_is_in_a_window(tokenizer: Any) -> None:
    rows = qa_features(questions("kind", "calm", question=CONTEXT), tokenizer, LENGTH, training=False)
    seen: dict[int, set[str]] = {0: set(), 1: set()}
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert words[1:6] == [*WORDS[:4], "[SEP]"]
        for word, (begin, end) in zip(words, row["offsets"], strict=True):
            assert (begin, end) == (-1, -1) or CONTEXT[begin:end] == word
        seen[row["example"]].update(words[6:-1])
    assert seen == {0: set(WORDS), 1: set(WORDS)}


def test_what_makes_no_windows(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_length: expected at least 12 for question answering, got 11"):
        qa_features(questions("kind"), tokenizer, 11)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: expected a fast one, which gives characters, got Slow"):
        qa_features(questions("kind"), Slow())


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
    padded = [np.pad(values, (0, 3), constant_values=9.0) for values in starts], [np.pad(v, (0, 3)) for v in ends]
    assert best_answers(rows, features, *padded) == answers
    starts[2][3] = np.nan
    with pytest.raises(ValueError, match="logits: expected finite values, got others in window 2"):
        best_answers(rows, features, starts, ends)


def test_spans_that_are_none(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = questions("kind")
    features = qa_features(rows, tokenizer, 31, training=False)
    # The greatest logits are in the question, or backwards; a span of 7 tokens is left, or one of one.
    starts, ends = np.zeros((2, 1, features["length"][0]))
    starts[0, 1] = ends[0, 2] = 9.0
    starts[0, 10], ends[0, 6] = 5.0, 6.0
    assert best_answers(rows, features, starts, ends) == {"q0": " ".join(WORDS[:3])}
    monkeypatch.setattr(squad, "MAX_ANSWER_LENGTH", 1)
    assert best_answers(rows, features, starts, ends) == {"q0": WORDS[2]}
    monkeypatch.setattr(squad, "N_BEST", 1)
    assert best_answers(rows, features, starts, ends) == {"q0": ""}


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


def reference(name: str, *texts: str) -> dict[str, Any]:
    return {"id": name, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


def test_scores_by_hand() -> None:
    references = [reference("a", "The Red Cat!", "dog"), reference("b", "small bird"), reference("c"), reference("d")]
    scores = squad_scores({"a": "red cat", "b": "a small blue bird", "c": "", "d": "y"}, references)
    # b: precision 2/3, recall 1.
    assert scores == pytest.approx({"exact_match": 50.0, "f1": 100 * (2 + 0.8) / 4}, abs=1e-4)
    for answers in ({"a": ""}, {"a": "", "b": "", "x": "", "d": ""}):
        with pytest.raises(ValueError, match="answers: expected one for each of 4 questions with distinct ids, got"):
            squad_scores(answers, references)
