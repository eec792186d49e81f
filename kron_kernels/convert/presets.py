"""Which layers of an encoder become Kronecker products, and of which shapes: versioned, JSON-able, with presets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..nn.quantized import check_weight_dtype
from .rules import Rule, ShapeRule, check_keys, rule_from_dict

# 2 added weight_dtype "int8", 3 low rank, bands, layers of their own and "int4"; the lowest that says all is written.
VERSIONS = (1, 2, 3)

# Module names of BERT-like encoders (RoBERTa, ELECTRA, ...), MPNet and GPT-2. Poolers and heads match none of them.
DEFAULT_PATTERNS: dict[str, tuple[str, ...]] = {
    "attention": (
        r"(^|\.)layer\.\d+\.(cross)?attention\.self\.(query|key|value)$",
        r"(^|\.)layer\.\d+\.(cross)?attention\.output\.dense$",
        r"(^|\.)layer\.\d+\.attention\.attn\.[qkvo]$",
        r"(^|\.)h\.\d+\.attn\.c_(attn|proj)$",
    ),
    "ffn_in": (r"(^|\.)layer\.\d+\.intermediate\.dense$", r"(^|\.)h\.\d+\.mlp\.c_fc$"),
    "ffn_out": (r"(^|\.)layer\.\d+\.output\.dense$", r"(^|\.)h\.\d+\.mlp\.c_proj$"),
    "embedding": (r"(^|\.)word_embeddings$", r"(^|\.)wte$"),
}


def _matches(regexes: Iterable[str], module_name: str) -> bool:
    return any(re.search(regex, module_name) for regex in regexes)


@dataclass(frozen=True)
class KronConfig:
    """How to compress an encoder: a shape rule for each role, and which modules play which role.

    ``patterns`` maps a role to regular expressions searched in the full module name; extend it for other
    architectures. ``skip`` lists expressions of modules that stay dense whatever their role. A role without a rule
    stays dense. ``layers`` maps single modules, by their names from the encoder on ("encoder.layer.0.output.dense"), to
    rules of their own. ``weight_dtype`` "int8" or "int4" stores large factors so (see ``quantize_``), None in the
    model's dtype. Raises ValueError for a rule whose role has no pattern, a broken expression and another weight_dtype.
    """

    rules: Mapping[str, Rule]
    name: str = "custom"
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(DEFAULT_PATTERNS))
    skip: tuple[str, ...] = ()
    weight_dtype: str | None = None
    layers: Mapping[str, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", dict(self.rules))
        object.__setattr__(self, "layers", dict(self.layers))
        object.__setattr__(self, "patterns", {role: tuple(regexes) for role, regexes in self.patterns.items()})
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.weight_dtype is not None:
            check_weight_dtype(self.weight_dtype)
        if not self.rules:
            raise ValueError("rules: expected at least one role, got none")
        for role in self.rules:
            if not self.patterns.get(role):
                raise ValueError(f"rules: role {role!r} has no patterns; known roles: {', '.join(self.patterns)}")
        for regex in (*self.skip, *(regex for regexes in self.patterns.values() for regex in regexes)):
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"patterns: {regex!r} is not a regular expression: {error}") from None

    def role_of(self, module_name: str) -> str | None:
        """Return the role of a module, None where it has none; ValueError where it has several."""
        roles = [role for role, regexes in self.patterns.items() if _matches(regexes, module_name)]
        if len(roles) > 1:
            raise ValueError(f"patterns: {module_name} matches several roles: {', '.join(roles)}")
        return roles[0] if roles else None

    def own_name(self, module_name: str) -> str | None:
        """Return the name under which ``layers`` has a rule for this module, None where it has none."""
        return next((name for name in self.layers if f".{module_name}".endswith(f".{name}")), None)

    def rule_of(self, module_name: str, role: str) -> Rule:
        """Return the rule of a module of ``role``: its own where ``layers`` has one."""
        own = self.own_name(module_name)
        return self.rules[role] if own is None else self.layers[own]

    def skips(self, module_name: str) -> bool:
        return _matches(self.skip, module_name)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict, with the version of its format."""
        optional: dict[str, Any] = {} if self.weight_dtype is None else {"weight_dtype": self.weight_dtype}
        newer = self.layers or self.weight_dtype == "int4"
        newer = newer or any(not isinstance(rule, ShapeRule) for rule in self.rules.values())
        version = 3 if newer else VERSIONS[len(optional)]
        if self.layers:
            optional["layers"] = {name: rule.to_dict() for name, rule in self.layers.items()}
        return {
            "version": version,
            "name": self.name,
            "rules": {role: rule.to_dict() for role, rule in self.rules.items()},
            "patterns": {role: list(regexes) for role, regexes in self.patterns.items()},
            "skip": list(self.skip),
            **optional,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KronConfig:
        """Read what ``to_dict`` wrote; ValueError for another version, for missing and for unknown keys."""
        if data.get("version") not in VERSIONS:
            raise ValueError(f"version: expected 1, 2 or 3, got {data.get('version')!r}")
        optional = {1: set(), 2: {"weight_dtype"}, 3: {"weight_dtype", "layers"}}[data["version"]]
        check_keys("config", data, {"version", "name", "rules", "patterns", "skip", *optional})
        rest = {key: data[key] for key in ("name", "patterns", "skip", "weight_dtype") if key in data}
        rules, layers = (_read_rules(key, data.get(key, default)) for key, default in (("rules", None), ("layers", {})))
        return cls(rules=rules, layers=layers, **rest)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> KronConfig:
        return cls.from_dict(json.loads(text))


def _read_rules(where: str, data: Any) -> dict[str, Rule]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a mapping from name to rule, got {data!r}")
    return {name: rule_from_dict(f"{where}[{name!r}]", rule) for name, rule in data.items()}


# The factor that is kept at every model size: B of the attention matrices, A of the FFN, B of the embedding.
_PRESETS: dict[str, dict[str, Rule]] = {
    "K8": {
        "attention": ShapeRule(b=(2, 2)),
        "ffn_in": ShapeRule(a=(8, 2)),
        "ffn_out": ShapeRule(a=(2, 8)),
        "embedding": ShapeRule(b=(1, 8)),
    },
    "K19": {
        "attention": ShapeRule(b=(2, 16)),
        "ffn_in": ShapeRule(a=(16, 2)),
        "ffn_out": ShapeRule(a=(2, 16)),
        "embedding": ShapeRule(b=(1, 12)),
    },
    "K21": {
        "attention": ShapeRule(b=(2, 16)),
        "ffn_in": ShapeRule(a=(16, 2)),
        "ffn_out": ShapeRule(a=(2, 16)),
        "embedding": ShapeRule(b=(1, 16)),
    },
    "KnGPT2": {
        "attention": ShapeRule(b=(1, 2)),
        "ffn_in": ShapeRule(b=(1, 2)),
        "ffn_out": ShapeRule(b=(1, 2)),
        "embedding": ShapeRule(b=(1, 2)),
    },
    "TQCompressor": {
        "ffn_in": ShapeRule(b=(4, 2), terms=4),
        "ffn_out": ShapeRule(b=(2, 4), terms=4),
        "embedding": ShapeRule(b=(1, 4)),
    },
    "TQCompressor-QKV": {
        "attention": ShapeRule(b=(1, 2)),
        "ffn_in": ShapeRule(b=(4, 2), terms=4),
        "ffn_out": ShapeRule(b=(2, 4), terms=4),
        "embedding": ShapeRule(b=(1, 4)),
    },
}
# Blocks 0, 2, 4, ... of GPT-2, which its presets leave dense.
_EVEN_BLOCKS = r"(^|\.)h\.\d*[02468]\."
_SKIPS: dict[str, tuple[str, ...]] = {
    "KnGPT2": (_EVEN_BLOCKS,),
    "TQCompressor": (_EVEN_BLOCKS,),
    "TQCompressor-QKV": (_EVEN_BLOCKS, r"(^|\.)attn\.c_proj$"),
}


def preset(name: str, hidden_size: int | None = None, intermediate_size: int | None = None) -> KronConfig:
    """Return a named configuration, whatever the name's case; its small factors are the same at every model size.

    "K8" and "K21": the shapes of KroneckerBERT (Tahaei et al., NAACL 2022, table 1): 7.7 and 21 times fewer
    parameters on BERT-base.

    "K19": our own, 5,716,620 parameters on BERT-base, 19.15 times fewer. It is K21, in multiply-adds too, with the
    embedding widened from 48 to 64 stored numbers a token. Chosen with ``factorize.search_model_shapes`` among all
    pairs of one large and one small factor (2 to 16 wide) within about 1 % of 19 times: spare parameters bring most
    in the embedding (more than in attention or in the feed-forward, fitted to a real encoder without training),
    and the one choice with 2 % fewer multiply-adds keeps a lower-rank feed-forward.

    "KnGPT2", of GPT-2's odd blocks (1, 3, ...), word embedding and tied head, each matrix halved (Edalati et al.,
    "Kronecker Decomposition for GPT Compression", 2021): 83,907,506 parameters of GPT-2 small's 124,439,808, where the
    paper has 83M. "TQCompressor": the feed-forward of the odd blocks by 4 terms of (768, 384) (x) (4, 2) and
    (384, 768) (x) (2, 4), the embedding by a row of 4 (Abronin et al., "TQCompressor", 2024, in the shapes of their
    published configuration): 81,336,388, where the paper has 81M. "TQCompressor-QKV" halves queries, keys and values of
    those blocks too. GPT-2 keeps queries, keys and values in one matrix: its three parts share their small factor.

    Given ``hidden_size`` and ``intermediate_size``, also checks that the shapes divide those of an encoder of that
    size. Raises ValueError for an unknown name and for a size that does not divide.
    """
    known = {each.casefold(): each for each in _PRESETS}
    if name.casefold() not in known:
        raise ValueError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
    name = known[name.casefold()]
    rules = _PRESETS[name]
    if hidden_size is not None and intermediate_size is not None:
        weights = {
            "attention": (hidden_size, hidden_size),
            "ffn_in": (intermediate_size, hidden_size),
            "ffn_out": (hidden_size, intermediate_size),
            "embedding": (1, hidden_size),
        }
        for role, rule in rules.items():
            try:
                if isinstance(rule, ShapeRule):
                    rule.resolve(*weights[role])
            except ValueError as error:
                sizes = f"hidden_size={hidden_size}, intermediate_size={intermediate_size}"
                raise ValueError(f"preset {name} does not fit {sizes}: {role}: {error}") from None
    return KronConfig(rules=rules, name=name, skip=_SKIPS.get(name, ()))


def as_kron_config(config: KronConfig | Mapping[str, Any] | str) -> KronConfig:
    """Return a KronConfig from one, from its dict, or from a preset's name."""
    if isinstance(config, KronConfig):
        return config
    if isinstance(config, str):
        return preset(config)
    if isinstance(config, Mapping):
        return KronConfig.from_dict(config)
    raise TypeError(f"config: expected a KronConfig, its dict or a preset's name, got {type(config).__name__}")
