"""The planner: the budget holds and is used, the choice is by agreement on text, too small a size is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from kron_kernels.compress import plan
from kron_kernels.compress.plan import Planner, parse_size
from kron_kernels.convert import KronConfig, calibrate
from kron_kernels.convert.agreement import sentence_vectors, vector_agreement
from kron_kernels.convert.counting import count_parameters
from kron_kernels.models import KronBertForMaskedLM, KronBertForSequenceClassification, KronBertModel

SIZES = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS = {**SIZES, "vocab_size": 600, "max_position_embeddings": 20, "initializer_range": 0.1}


def planner(kind: Any = BertModel, *, rows: int = 8, length: int = 12, broken: bool = False) -> Planner:
    torch.manual_seed(0)
    dense = kind(BertConfig(**OPTIONS)).eval()
    batches = [{"input_ids": torch.randint(1, 600, (rows, length))} for _ in range(3)]
    if broken:
        dense.embeddings.word_embeddings.weight.data[0, 3] = float("nan")
    return Planner(dense, calibrate(dense, batches), batches)


def test_budget_holds_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_BAND_TOKENS", ((50, 150), (100, 200)))
    made = planner()
    for params in (20_000, 30_000, 60_000):
        found = made.plan(params)
        student = KronBertModel.from_dense(made._dense, found.config, calibration=made._calibration)
        assert count_parameters(student) == found.params
        assert 0.93 * params < found.params <= params
        assert KronConfig.from_json(found.config.to_json()) == found.config


def test_the_best_candidate_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_BAND_TOKENS", ((50, 150), (100, 200)))
    made = planner()
    found = made.plan(40_000)
    agreements = []
    for config in made._candidates(40_000 - made._kept):
        student = KronBertModel.from_dense(made._dense, config, calibration=made._calibration)
        vectors = sentence_vectors(student.eval(), made._batches)
        agreements.append(vector_agreement(sentence_vectors(made._dense, made._batches), vectors)["correlation"])
    assert len(agreements) > 2
    assert found.agreement["correlation"] == pytest.approx(max(agreements), abs=1e-5)
    assert max(agreements) > min(agreements) + 1e-3


@pytest.mark.parametrize(
    ("dense", "compressed"),
    [
        (BertForMaskedLM, KronBertForMaskedLM),
        (BertForSequenceClassification, KronBertForSequenceClassification),
    ],
)
def test_models_with_a_head(dense: Any, compressed: Any) -> None:
    made = planner(dense)
    found = made.plan(made.dense_params // 3)
    student = compressed.from_dense(made._dense, found.config, calibration=made._calibration)
    assert count_parameters(student) == found.params <= made.dense_params // 3


def test_layers_stay_dense_where_a_rank_would_save_nothing() -> None:
    made = planner()
    linear = sum(rows * cols for role in plan.ROLES[:-1] for rows, cols in made._shapes[role])
    assert made._ranks(linear) == {}
    some = made._ranks(int(0.9 * linear))
    assert some is not None
    assert max(rule.rank for rule in some.values()) < 48


def test_too_small_a_size_names_the_least() -> None:
    made = planner()
    with pytest.raises(ValueError, match=r"size: expected at least [\d,]+ parameters, got 100") as caught:
        made.plan(100)
    least = int(str(caught.value).split()[4].replace(",", ""))
    assert made.plan(least).params <= least
    with pytest.raises(ValueError, match="size: expected at least"):
        made.plan(least - 1)


def test_a_share_to_keep_is_met_by_a_small_size_or_the_best_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_EMBEDDING_SHARES", (0.5,))
    made = planner()
    share = made.plan(made.dense_params // 3).agreement["correlation"]
    found = made.plan_keeping(share, tries=3)
    assert found.agreement["correlation"] >= share
    assert found.params < made.dense_params // 2
    assert made.plan_keeping(0.999999999, tries=3) == made.plan(made.dense_params - 1)
    with pytest.raises(ValueError, match=r"keep: expected a share between 0 and 1, got 1\.5"):
        made.plan_keeping(1.5)


def test_text_and_weights_that_cannot_be_planned_on() -> None:
    with pytest.raises(ValueError, match="text: expected at least 8 different sentences to plan on, got 6"):
        planner(rows=2)
    short = planner(rows=3, length=3)
    with pytest.raises(ValueError, match=r"text: expected at least \d+ tokens for rank \d+, got 27; give more"):
        short.plan(short.dense_params // 2)
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or inf in embeddings\.word_"):
        planner(broken=True)


def test_sizes() -> None:
    assert (parse_size("8x", 800), parse_size("2.5x", 1000), parse_size("300", 800), parse_size(300, 800)) == (
        *(100, 400, 300, 300),
    )
    for wrong in ("0", "1x", "x", "-3x", "900", "eight", ""):
        with pytest.raises(ValueError, match='size: expected "8x" for eight times fewer parameters'):
            parse_size(wrong, 800)
