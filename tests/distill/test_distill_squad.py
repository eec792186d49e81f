"""Extractive question answering: windows, positions, answers from logits and their scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from tests.compress.tiny_bert import WORDS, save_bert

datasets = pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import PaddingCollator, best_answers, qa_features, squad_scores  # noqa: E402

CONTEXT = " ".join(WORDS)  # 14 different words, a token each


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(save_bert(tmp_path_factory.mktemp("words") / "bert"))


def questions(*answers: str | None, question: str = "the cat", context: str = CONTEXT) -> Any:
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
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = {name: datasets.Value("string") for name in ("id", "question", "context")}
    features["answers"] = {"text": [datasets.Value("string")], "answer_start": [datasets.Value("int32")]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def features_of(rows: Any, tokenizer: Any, **options: Any) -> Any:
    return qa_features(rows, tokenizer, **{"max_length": 11, "doc_stride": 2, "max_question_length": 3, **options})


@pytest.mark.parametrize(
    ("answer", "windows"),
    [("bird", 2), ("bird sees", 2), ("the", 1), ("blue", 1), ("dog bird sees", 1), ("dog bird sees likes", 0)],
)
def test_positions_are_those_of_the_answer_where_a_window_holds_it(answer: str, windows: int, tokenizer: Any) -> None:
    rows = features_of(questions(answer), tokenizer)
    # [CLS] the cat [SEP] six words [SEP]; windows share two words.
    assert rows["length"][:] == [11, 11, 11]
    held = 0
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        context = " ".join(words[4:-1])
        start, end = row["start_positions"], row["end_positions"]
        if answer in context:
            held += 1
            assert " ".join(words[start : end + 1]) == answer
            assert start >= 4
        else:
            assert (start, end) == (0, 0)
        assert row["token_type_ids"] == [0] * 4 + [1] * 7
    assert held == windows


def test_answers_in_the_question_and_white_space_do_not_mislead(tokenizer: Any) -> None:
    rows = features_of(questions(" cat dog ", question="  the cat dog"), tokenizer, max_length=40)
    words = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert words[1:5] == ["the", "cat", "dog", "[SEP]"]
    assert words[rows[0]["start_positions"] : rows[0]["end_positions"] + 1] == ["cat", "dog"]
    assert rows[0]["start_positions"] > 4


def test_an_answer_within_a_token_takes_the_whole_token(tokenizer: Any) -> None:
    rows = features_of(questions("mal"), tokenizer, max_length=40)
    words = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert words[rows[0]["start_positions"] : rows[0]["end_positions"] + 1] == ["small"]


def test_long_questions_are_cut_and_every_word_of_the_context_is_in_a_window(tokenizer: Any) -> None:
    rows = features_of(questions("bird", "blue", question=CONTEXT), tokenizer, training=False)
    assert rows["example"][:] == [0] * 4 + [1] * 4
    seen: dict[int, set[str]] = {0: set(), 1: set()}
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert words[1:5] == [*WORDS[:3], "[SEP]"]
        for word, (begin, end) in zip(words, row["offsets"], strict=True):
            assert (begin, end) == (-1, -1) or CONTEXT[begin:end] == word
        inside = [word for word, (begin, _) in zip(words, row["offsets"], strict=True) if begin >= 0]
        assert inside == words[5:-1]
        seen[row["example"]].update(inside)
    assert seen == {0: set(WORDS), 1: set(WORDS)}


def test_questions_without_an_answer(tokenizer: Any) -> None:
    rows = features_of(questions(None), tokenizer)
    assert rows["start_positions"][:] == rows["end_positions"][:] == [0, 0, 0]


def test_features_of_many_batches_name_their_rows(tokenizer: Any) -> None:
    rows = features_of(questions(*["cat"] * 1100), tokenizer, max_length=40, training=False)
    assert rows["example"][:] == list(range(1100))


def test_features_pad(tokenizer: Any) -> None:
    rows = features_of(questions("bird"), tokenizer, max_length=12)
    batch = PaddingCollator(tokenizer)([rows[index] for index in range(len(rows))])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}


@pytest.mark.parametrize(("start", "text"), [(-1, "cat"), (60, "red blue"), (0, " ")])
def test_answers_outside_of_the_context(start: int, text: str, tokenizer: Any) -> None:
    rows = questions("cat", "bird")
    columns = {
        **rows[:],
        "answers": [{"text": ["cat"], "answer_start": [6]}, {"text": [text], "answer_start": [start]}],
    }
    with pytest.raises(
        ValueError, match=rf"answers: expected a text within the \d+ characters .* 'q1', got '{text}' at"
    ):
        features_of(datasets.Dataset.from_dict(columns), tokenizer)


def test_what_makes_no_windows(tokenizer: Any) -> None:
    for options in ({"max_length": 8}, {"doc_stride": 5}, {"doc_stride": -1}, {"max_question_length": 0}):
        with pytest.raises(ValueError, match="max_length: expected room for a question of"):
            features_of(questions("cat"), tokenizer, **options)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: expected a fast one, which gives characters, got Slow"):
        qa_features(questions("cat"), Slow())


def logits_for(features: Any, spans: dict[int, tuple[int, int, float]]) -> tuple[list[Any], list[Any]]:
    """Zeros, with a score at the start and the end of a span of each of these windows."""
    starts = [np.zeros(length) for length in features["length"]]
    ends = [np.zeros(length) for length in features["length"]]
    for window, (start, end, value) in spans.items():
        starts[window][start] = ends[window][end] = value
    return starts, ends


def test_the_best_span_of_all_windows(tokenizer: Any) -> None:
    rows = questions("bird", "cat")
    features = features_of(rows, tokenizer, training=False)
    starts, ends = logits_for(features, {0: (4, 5, 2.0), 1: (5, 7, 3.0), 4: (6, 6, 1.0)})
    answers = best_answers(rows, features, starts, ends)
    # Windows begin at words 0, 4 and 8; their context at token 4.
    assert answers == {"q0": " ".join(WORDS[5:8]), "q1": WORDS[6]}
    padded = [np.pad(values, (0, 3), constant_values=9.0) for values in starts], [np.pad(v, (0, 3)) for v in ends]
    assert best_answers(rows, features, *padded) == answers


def test_spans_that_are_none(tokenizer: Any) -> None:
    rows = questions("bird")
    features = features_of(rows, tokenizer, max_length=40, training=False)
    # The greatest logits are in the question, backwards and over too many tokens; the span that is left is one word.
    starts, ends = np.zeros((2, 1, features["length"][0]))
    starts[0, 1], ends[0, 2] = 9.0, 9.0
    starts[0, 10], ends[0, 6] = 5.0, 6.0
    assert best_answers(rows, features, starts, ends, max_answer_length=1) == {"q0": WORDS[2]}
    assert best_answers(rows, features, starts, ends, max_answer_length=30) == {"q0": " ".join(WORDS[:3])}
    assert best_answers(rows, features, starts, ends, n_best=1) == {"q0": ""}
    starts[0, 6] = 7.0  # the greatest of the context, if not of the question
    assert best_answers(rows, features, starts, ends, n_best=1) == {"q0": WORDS[2]}


@pytest.mark.parametrize(("null", "threshold", "wanted"), [(3.0, 0.0, "cat"), (5.0, 0.0, ""), (5.0, 3.0, "cat")])
def test_no_answer(null: float, threshold: float, wanted: str, tokenizer: Any) -> None:
    rows = questions(None)
    features = features_of(rows, tokenizer, training=False)
    starts, ends = logits_for(features, {0: (6, 6, 2.0)})
    for window, values in enumerate(starts):
        # A window that does not hold the answer says so more clearly: the least counts.
        values[0] = null + 10 * window
    options = {"no_answer": True, "null_threshold": threshold}
    assert best_answers(rows, features, starts, ends, **options) == {"q0": wanted}
    assert best_answers(rows, features, starts, ends) == {"q0": "cat"}


def test_logits_that_do_not_fit(tokenizer: Any) -> None:
    rows = questions("bird")
    features = features_of(rows, tokenizer, training=False)
    starts, ends = logits_for(features, {})
    with pytest.raises(ValueError, match="start_logits: expected those of 3 windows, got 2"):
        best_answers(rows, features, starts[:2], ends)
    with pytest.raises(ValueError, match=r"end_logits: expected at least 11 values for window 1, got shape \(5,\)"):
        best_answers(rows, features, starts, [ends[0], ends[1][:5], ends[2]])
    starts[2][3] = np.nan
    with pytest.raises(ValueError, match="start_logits: expected finite values, got others in window 2"):
        best_answers(rows, features, starts, ends)


def reference(name: str, *texts: str) -> dict[str, Any]:
    return {"id": name, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


def test_scores_by_hand() -> None:
    references = [reference("a", "The Red Cat!", "dog"), reference("b", "small bird"), reference("c", "x")]
    scores = squad_scores({"a": "red cat", "b": "a small blue bird", "c": "y"}, references)
    # b: precision 2/3, recall 1.
    assert scores == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (1 + 0.8) / 3}, abs=1e-4)


def test_scores_without_answers() -> None:
    references = [reference("a"), reference("b"), reference("c", "cat"), reference("d", "dog")]
    scores = squad_scores({"a": "", "b": "cat", "c": "", "d": "dog"}, references)
    assert scores == {"exact_match": 50.0, "f1": 50.0}


def test_scores_want_every_question_once() -> None:
    with pytest.raises(ValueError, match="answers: expected those of 2 questions, got 1; 'b' is in one alone"):
        squad_scores({"a": ""}, [reference("a"), reference("b")])
    with pytest.raises(ValueError, match="answers: expected those of 1 questions, got 2; 'c' is in one alone"):
        squad_scores({"a": "", "c": ""}, [reference("a")])
    with pytest.raises(ValueError, match="references: expected distinct ids, got 1 in 2 questions"):
        squad_scores({"a": ""}, [reference("a"), reference("a")])
    with pytest.raises(ValueError, match="references: expected distinct ids, got 0 in 0 questions"):
        squad_scores({}, [])
