"""Rules of layers: what they resolve to, their dicts, and one line for whatever does not fit."""

from __future__ import annotations

import json

import pytest
from torch import nn

from kron_kernels.convert.layers import Target
from kron_kernels.convert.rules import BandRule, LowRankRule, ShapeRule, rule_from_dict

RULES = {
    "a=4x2": ShapeRule(a=(4, 2)),
    "b=2x3, terms=4": ShapeRule(b=(2, 3), terms=4),
    "rank 7": LowRankRule(7),
    "bands 10x6, restx2": BandRule(((10, 6), (None, 2))),
}


@pytest.mark.parametrize(("text", "rule"), RULES.items(), ids=RULES)
def test_dicts_are_json_and_come_back(text: str, rule) -> None:
    assert str(rule) == text
    assert rule_from_dict("here", json.loads(json.dumps(rule.to_dict()))) == rule


def test_the_other_factor_and_the_last_band_follow() -> None:
    assert ShapeRule(a=(4, 2)).resolve(8, 12) == ((4, 2), (2, 6))
    assert ShapeRule(b=(2, 6)).resolve(8, 12) == ((4, 2), (2, 6))
    assert BandRule(((10, 6), (None, 2))).resolve(50) == ((10, 6), (40, 2))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ShapeRule(), "rule: expected exactly one of a and b, got a=None, b=None"),
        (lambda: ShapeRule(a=(2, 2), terms=0), "terms: expected an integer of at least 1, got 0"),
        (lambda: ShapeRule(a=(4, 5)).resolve(8, 12), "a: a factor of 4x5 does not divide a weight of 8x12"),
        (lambda: LowRankRule(0), "rank: expected a positive integer, got 0"),
        (lambda: LowRankRule(True), "rank: expected a positive integer, got True"),
        (lambda: BandRule(()), r"bands: expected pairs \(tokens, rank\), got \(\)"),
        (lambda: BandRule(((10, 6),)), r"bands: expected pairs \(tokens, rank\), the last \(None, rank\), got"),
        (lambda: BandRule(((None, 6), (None, 2))), r"bands: .*, the last \(None, rank\), got"),
        (lambda: BandRule(((10, 0), (None, 2))), r"bands: .*, the last \(None, rank\), got"),
        (lambda: BandRule((7,)), r"bands: .*, the last \(None, rank\), got \(7,\)"),
        (
            lambda: BandRule(((50, 6), (None, 2))).resolve(50),
            "bands: expected fewer tokens than the voc.* 50, got 50",
        ),
        (
            lambda: rule_from_dict("here", {"rank": 2, "terms": 3}),
            "here: expected a or b with terms, or rank, or band",
        ),
        (lambda: rule_from_dict("here", {"ranks": 2}), "here: unknown keys ranks; expected a, b, bands, rank, terms"),
        (lambda: rule_from_dict("here", 7), "here: expected a mapping, got 7"),
    ],
)
def test_bad_rules(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


LINEAR, WORDS = nn.Linear(12, 8), nn.Embedding(50, 12)


@pytest.mark.parametrize(
    ("module", "rule", "structure"),
    [
        (LINEAR, ShapeRule(b=(2, 3)), "4x4 (x) 2x3"),
        (LINEAR, ShapeRule(b=(2, 3), terms=4), "4 of 4x4 (x) 2x3"),
        (LINEAR, LowRankRule(5), "rank 5"),
        (WORDS, ShapeRule(b=(1, 4)), "50x3 (x) 1x4"),
        (WORDS, LowRankRule(5), "bands 50x5"),
        (WORDS, BandRule(((10, 6), (None, 2))), "bands 10x6, 40x2"),
    ],
)
def test_structure_of_a_layer(module: nn.Module, rule, structure: str) -> None:
    target = Target("name", "role", module, rule)
    target.check()
    assert target.structure() == structure


@pytest.mark.parametrize(
    ("module", "rule", "match"),
    [
        (WORDS, ShapeRule(b=(2, 3)), r"b: expected a row vector \(1, k\) for an embedding, got 2x3"),
        (LINEAR, ShapeRule(b=(2, 3), terms=7), r"terms: expected at most min\(m1\*n1, m2\*n2\) = 6, got 7"),
        (LINEAR, LowRankRule(9), "rank: expected at most 8, got 9"),
        (WORDS, LowRankRule(13), "rank: expected at most 12, got 13"),
        (WORDS, BandRule(((10, 2), (None, 13))), "rank: expected at most 12, got 13"),
        (LINEAR, BandRule(((10, 6), (None, 2))), "bands: expected an embedding, got a linear layer; give it a rank"),
        (WORDS, BandRule(((60, 6), (None, 2))), "bands: expected fewer tokens than the vocabulary's 50, got 60"),
    ],
)
def test_rules_that_do_not_fit_a_layer(module: nn.Module, rule, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Target("name", "role", module, rule).check()
