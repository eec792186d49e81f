"""Costs of a whole encoder, and the search of shapes for a wanted compression."""

from __future__ import annotations

import pytest

from kron_kernels.factorize import BertSize, ModelShapes, model_shapes, search_model_shapes


def k8() -> ModelShapes:
    return model_shapes(BertSize(), (384, 384), (8, 2), (2, 8), (30522, 96))


def k21() -> ModelShapes:
    return model_shapes(BertSize(), (384, 48), (16, 2), (2, 16), (30522, 48))


def test_counts_of_kroneckerbert() -> None:
    """Parameters and FLOPs at 128 tokens of the published shapes (Tahaei et al., NAACL 2022, table 1)."""
    assert BertSize().dense_params() == 109_482_240
    assert BertSize(pooler=False).dense_params() == 108_891_648
    assert k8().params == 14_654_216
    assert k21().params == 5_228_272
    assert k8().macs == 12 * 1_787_904
    assert round(128 * k8().flops / 1e9, 3) == 5.475
    assert round(128 * k21().flops / 1e9, 3) == 1.403
    assert round(k8().compression, 2) == 7.47


def test_search_finds_the_published_shapes_fewest_multiply_adds_first() -> None:
    found = search_model_shapes(21, tolerance=0.01, limit=None)
    wanted = ((384, 48), (16, 2), (30522, 48))
    assert any((each.attention.a, each.ffn_in.a, each.embedding.a) == wanted for each in found)
    assert [shapes.macs for shapes in found] == sorted(shapes.macs for shapes in found)
    for shapes in found:
        assert shapes.compression == pytest.approx(21, rel=0.01)
        assert shapes.ffn_out.a == shapes.ffn_in.a[::-1]
    assert search_model_shapes(21, BertSize(hidden=7, intermediate=7), tolerance=0.01) == []


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"target_compression: expected a number above 1, got 0\.5"):
        search_model_shapes(0.5)
    with pytest.raises(ValueError, match="hidden: expected a positive int, got 0"):
        BertSize(hidden=0)
