"""The planner: ranks of the linear layers and bands of the embedding for a number of parameters.

All attention layers get one rank, all feed-forward layers another of 1.5 times that, and the embedding bands of falling
frequency whose ranks fall as 8 to 3 to 1. What is searched is the share of the embedding and where its bands end: each
candidate is fitted and its sentence vectors are compared with the dense model's on text. Ranks of each layer's own,
by how much its error moves the sentence vectors, were tried and lost: such losses do not add up where they are large.

Low rank alone is planned: untrained its error is smaller than that of a Kronecker pair of the same size, trained both
are level, and it takes half the multiply-adds (docs/results/accuracy.md).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..convert.agreement import sentence_vectors, vector_agreement
from ..convert.calibrate import Calibration, Progress
from ..convert.conv1d import weight_shape
from ..convert.counting import count_parameters
from ..convert.kronify import kronified_copy, named_roles
from ..convert.presets import KronConfig
from ..convert.rules import BandRule, LowRankRule, Rule

ROLES = ("attention", "ffn_in", "ffn_out", "embedding")
# The layers that are planned.
EVERY_LAYER = KronConfig({role: LowRankRule(1) for role in ROLES}, name="planned")
FFN_RANK = 1.5  # of the attention's
_BAND_RANKS = (8, 3, 1)
_BAND_TOKENS = ((1000, 4000), (2000, 8000))
_EMBEDDING_SHARES = (0.5, 0.65)  # of all that is factored; each candidate costs a whole fit
# Fewer sentences than this do not tell plans apart; a fit of rank r to fewer than r tokens times this is of the text.
LEAST_SENTENCES, TOKENS_A_RANK = 8, 4


@dataclass(frozen=True)
class Plan:
    """A configuration, the parameters of the whole model, and its ``vector_agreement`` before any training."""

    config: KronConfig
    params: int
    agreement: Mapping[str, float]

    def __str__(self) -> str:
        """The rule of every layer type, one a line; a type without one stays dense."""
        return "\n".join(f"{role:<10} {self.config.rules.get(role, 'dense')}" for role in ROLES)


class Planner:
    """Plan for one dense encoder, a BERT-like one or one with a head, and any number of parameters.

    ``calibration`` holds the moments of its linear layers and token counts; ``batches`` (``input_ids``,
    ``attention_mask``) are the text that sentence vectors are compared on. Raises ValueError for fewer than
    ``LEAST_SENTENCES`` sentences and for weights that are not finite.
    """

    def __init__(
        self,
        dense: Any,
        calibration: Calibration,
        batches: Sequence[Mapping[str, Tensor]],
        progress: Progress | None = None,
    ) -> None:
        self._dense, self._calibration, self._batches, self._progress = dense, calibration, batches, progress
        self._tokens = 0
        self._shapes: dict[str, list[tuple[int, int]]] = {role: [] for role in ROLES}
        for name, role, module in named_roles(dense, EVERY_LAYER):
            self._shapes[role].append(weight_shape(module))  # type: ignore[arg-type]
            self._tokens = calibration.tokens.get(name, self._tokens)  # every layer sees the same
            if not torch.isfinite(module.weight).all():  # type: ignore[arg-type]
                raise ValueError(f"model: expected finite weights, got NaN or inf in {name}")
        self.dense_params = count_parameters(dense)
        replaced = sum(rows * cols for shapes in self._shapes.values() for rows, cols in shapes)
        self._kept = self.dense_params - replaced
        self._wanted = sentence_vectors(dense, batches)
        if len(self._wanted) < LEAST_SENTENCES:
            got = len(self._wanted)
            raise ValueError(f"text: expected at least {LEAST_SENTENCES} different sentences to plan on, got {got}")

    @torch.no_grad()
    def plan(self, params: int) -> Plan:
        """Choose the candidate whose sentence vectors agree best, with at most ``params`` parameters.

        Raises ValueError where that is less than what stays dense and rank 1 everywhere, and where the text is too
        short for the ranks.
        """
        configs = list(self._candidates(params - self._kept))
        if not configs:
            raise ValueError(f"size: expected at least {self.least():,} parameters, got {params:,}")
        rules = [rule for config in configs for rule in config.rules.values()]
        most = max((rule.rank for rule in rules if isinstance(rule, LowRankRule)), default=0)
        if self._tokens < TOKENS_A_RANK * most:
            needed = f"{TOKENS_A_RANK * most:,} tokens for rank {most}"
            raise ValueError(
                f"text: expected at least {needed}, got {self._tokens:,}; give more text or a smaller size"
            )
        plans = []
        for done, config in enumerate(configs, 1):
            model, report = kronified_copy(self._dense, config, calibration=self._calibration)
            found = vector_agreement(self._wanted, sentence_vectors(model, self._batches))
            plans.append(Plan(config, report.params_after, found))
            if self._progress is not None:
                self._progress(done, len(configs), "comparing plans")
        return max(plans, key=lambda plan: plan.agreement["correlation"])

    def least(self) -> int:
        """The fewest parameters that can be planned for."""
        sizes = range(self._kept, self.dense_params)
        return sizes[bisect_left(sizes, True, key=lambda size: any(self._candidates(size - self._kept)))]

    def plan_keeping(self, share: float, tries: int = 6) -> Plan:
        """Choose the smallest plan found whose similarities of sentences correlate by ``share`` with the dense model's.

        Sizes are halved by ratio ``tries`` times. Where no size below the dense model's keeps the share, the plan that
        keeps most is returned. Raises ValueError for a share that is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise ValueError(f"keep: expected a share between 0 and 1, got {share}")
        low, high = self.least(), self.dense_params - 1
        best = self.plan(high)
        for _ in range(tries):
            if best.agreement["correlation"] < share:
                break
            size = round((low * high) ** 0.5)
            found = self.plan(size)
            if found.agreement["correlation"] >= share:
                best, high = found, size
            else:
                low = size
        return best

    def _candidates(self, budget: int) -> Iterator[KronConfig]:
        seen = []
        for tokens in _BAND_TOKENS:
            for share in _EMBEDDING_SHARES:
                bands, left = self._bands(tokens, budget, int(share * budget))
                ranks = self._ranks(left)
                if bands is None or ranks is None:
                    continue
                rules: dict[str, Rule] = {**ranks, "embedding": bands}
                config = KronConfig(rules, name="planned")
                if config not in seen:
                    seen.append(config)
                    yield config

    def _bands(self, tokens: Sequence[int], budget: int, share: int) -> tuple[BandRule | None, int]:
        """The embedding's bands for ``share`` parameters, None if too little, and what is left of ``budget``."""
        ((rows, width),) = self._shapes["embedding"]
        counts = [*tokens, rows - sum(tokens)] if sum(tokens) < rows else [rows]
        weights = _BAND_RANKS[-len(counts) :]
        unit = (share - len(counts) * width) / sum(
            weight * (count + width) for weight, count in zip(weights, counts, strict=True)
        )
        ranks = [min(int(weight * unit), width, count) for weight, count in zip(weights, counts, strict=True)]
        cost = len(counts) * width + sum(rank * (count + width) for rank, count in zip(ranks, counts, strict=True))
        if min(ranks) < 1:
            return None, 0
        limits = [*counts[:-1], None]
        return BandRule(tuple(zip(limits, ranks, strict=True))), budget - cost

    def _ranks(self, budget: int) -> dict[str, LowRankRule] | None:
        """Ranks of the linear layers for ``budget`` parameters, but of roles that stay dense; None if too little."""
        attention = self._shapes["attention"]
        ffn = self._shapes["ffn_in"] + self._shapes["ffn_out"]
        per_rank = [sum(rows + cols for rows, cols in shapes) for shapes in (attention, ffn)]
        most = [min(rows * cols // (rows + cols) for rows, cols in shapes) for shapes in (attention, ffn)]
        first = int(budget / (per_rank[0] + FFN_RANK * per_rank[1]))
        rules = {}
        if first >= most[0]:
            budget -= sum(rows * cols for rows, cols in attention)
        else:
            rules["attention"] = LowRankRule(max(1, first))
            budget -= max(1, first) * per_rank[0]
        second = budget // per_rank[1]
        if first < 1 or second < 1:
            return None
        if second < most[1]:
            rules |= {role: LowRankRule(second) for role in ("ffn_in", "ffn_out")}
        return rules


def parse_size(size: str | int, dense_params: int) -> int:
    """Turn "8x", or a number of parameters, into a number of parameters; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", str(size))
    if match and float(match[1]) > 1:
        return int(dense_params / float(match[1]))
    if str(size).isdigit() and 0 < int(size) < dense_params:
        return int(size)
    raise ValueError(
        f'size: expected "8x" for eight times fewer parameters, or a number of them below the dense model\'s '
        f"{dense_params:,}, got {size!r}"
    )
