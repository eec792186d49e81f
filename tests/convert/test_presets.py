"""Configurations: the paper's shapes at every model size, roles by name, and errors for what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kron_kernels.convert.presets import KronConfig, as_kron_config, preset
from kron_kernels.convert.rules import BandRule, LowRankRule, ShapeRule

WEIGHTS = {"attention": (768, 768), "ffn_in": (3072, 768), "ffn_out": (768, 3072), "embedding": (30522, 768)}

# Tahaei et al., NAACL 2022, table 1
SHAPES = {
    "K8": {
        "attention": ((384, 384), (2, 2)),
        "ffn_in": ((8, 2), (384, 384)),
        "ffn_out": ((2, 8), (384, 384)),
        "embedding": ((30522, 96), (1, 8)),
    },
    "K21": {
        "attention": ((384, 48), (2, 16)),
        "ffn_in": ((16, 2), (192, 384)),
        "ffn_out": ((2, 16), (384, 192)),
        "embedding": ((30522, 48), (1, 16)),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_presets_have_their_shapes_on_bert_base(name):
    config = preset(name, 768, 3072)
    assert config.name == name
    assert {role: rule.resolve(*WEIGHTS[role]) for role, rule in config.rules.items()} == SHAPES[name]


def test_a_size_that_does_not_divide_is_named():
    with pytest.raises(
        ValueError,
        match=r"preset K21 does not fit hidden_size=200, intermediate_size=800: attention: "
        r"b: a factor of 2x16 does not divide a weight of 200x200",
    ):
        preset("K21", 200, 800)


def test_json_round_trip():
    config = KronConfig(
        {"attention": ShapeRule(a=(4, 2), terms=3), "mixer": ShapeRule(b=(2, 2))},
        name="mine",
        patterns={"attention": (r"q$",), "mixer": (r"mix$",)},
        skip=(r"layer\.0\.",),
    )
    assert KronConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["version"] == 1
    assert as_kron_config(config) is config
    assert as_kron_config(config.to_dict()) == config
    assert as_kron_config("kngpt2") == preset("KnGPT2")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("bert.encoder.layer.11.attention.self.query", "attention"),
        ("mpnet.encoder.layer.3.attention.attn.o", "attention"),
        ("encoder.layer.0.intermediate.dense", "ffn_in"),
        ("encoder.layer.0.output.dense", "ffn_out"),
        ("embeddings.word_embeddings", "embedding"),
        ("pooler.dense", None),
        ("cls.predictions.decoder", None),
    ],
)
def test_roles_of_module_names(name, role):
    assert preset("K8").role_of(name) == role


def changed(**changes):
    return {**preset("K8").to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (changed(version=4), "version: expected 1, 2 or 3, got 4"),
        (changed(size=3), "config: unknown keys size; expected name, patterns, rules, skip, version"),
        (
            changed(rules={"attention": {"c": [2, 2]}}),
            r"rules\['attention'\]: unknown keys c; expected a, b, bands, ra",
        ),
        (changed(rules=None), "rules: expected a mapping from name to rule, got None"),
        (changed(version=3, layers=[2]), r"layers: expected a mapping from name to rule, got \[2\]"),
        (changed(version=3, layers={"x": {"rank": 0}}), "rank: expected a positive integer, got 0"),
        (changed(layers={}), "config: unknown keys layers; expected name, patterns, rules, skip, version"),
        (changed(rules={}), "rules: expected at least one role, got none"),
        (changed(rules={"mixer": {"a": [2, 2]}}), "rules: role 'mixer' has no patterns; known roles: attention"),
        (changed(version=2, weight_dtype="int2"), "weight_dtype: expected 'int8' or 'int4', got 'int2'"),
        (changed(rules={"attention": {"a": [2, 0]}}), r"a: expected two positive integers, got \[2, 0\]"),
        (changed(rules={"attention": {}}), "rule: expected exactly one of a and b, got a=None, b=None"),
    ],
)
def test_bad_configurations(data, match):
    with pytest.raises(ValueError, match=match):
        KronConfig.from_dict(data)


def test_newer_structures_are_written_in_version_3_only():
    plain = preset("K8")
    for newer in (
        replace(plain, rules={**plain.rules, "attention": LowRankRule(8)}),
        replace(plain, rules={**plain.rules, "embedding": BandRule(((10, 6), (None, 2)))}),
        replace(plain, layers={"encoder.layer.0.output.dense": LowRankRule(8)}, weight_dtype="int8"),
        replace(plain, weight_dtype="int4"),
    ):
        assert newer.to_dict()["version"] == 3
        assert KronConfig.from_json(newer.to_json()) == newer
    assert "layers" not in plain.to_dict()


def test_weight_dtype_is_written_in_version_2_only():
    plain = preset("K8")
    assert plain.to_dict()["version"] == 1
    assert "weight_dtype" not in plain.to_dict()
    int8 = replace(plain, weight_dtype="int8")
    assert int8.to_dict() == {**plain.to_dict(), "version": 2, "weight_dtype": "int8"}
    assert KronConfig.from_json(int8.to_json()) == int8
    assert KronConfig.from_dict({**plain.to_dict(), "version": 2}) == plain
