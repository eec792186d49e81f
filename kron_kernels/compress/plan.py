"""The planner: a rank for every layer and bands for the embedding, from measured errors, for a number of parameters.

A layer of rank r loses the share ``sum_{i > r} s_i^2 / sum_i s_i^2`` of its output, with the singular values s of
``W C^(1/2)``, C the covariance of its inputs; likewise a band of the embedding, its rows weighted by frequency. How
much a share matters is measured: one group of layers at a time is replaced at a low rank, and what the sentence vectors
lose is divided by the share that the layers lost. Ranks then go where a parameter gains most. Since such losses do not
add up when they are large, whole models with more and less weight on the embedding are compared on text, and the best
is taken.

Low rank alone is planned: untrained its error is smaller than that of a Kronecker pair of the same size, trained both
are level, and it takes half the multiply-adds (docs/results/accuracy.md).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..convert.agreement import sentence_vectors, vector_agreement
from ..convert.calibrate import Calibration, Progress
from ..convert.counting import count_parameters
from ..convert.kronify import kronified_copy, named_roles
from ..convert.presets import KronConfig
from ..convert.rules import BandRule, LowRankRule, Rule
from ..factorize.low_rank import output_directions, principal_energies
from ..nn.adaptive import frequency_order
from ..nn.linear import covariance

ROLES = ("attention", "ffn_in", "ffn_out", "embedding")
STEP = 2  # ranks are multiples of it
_PROBED = 0.2  # of the largest rank, where the importance of a group is measured
# Tokens of the bands that are compared; the rest of the vocabulary is one more.
_BANDS = ((1000, 4000), (2000, 8000))
# Factors of the embedding's measured importance that are compared.
_EMBEDDING_WEIGHTS = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Plan:
    """A configuration, the parameters of the whole model, and its ``vector_agreement`` before any training."""

    config: KronConfig
    params: int
    agreement: Mapping[str, float]


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


class _Part:
    """A linear layer, or a band of the embedding, whose rank is to be chosen."""

    def __init__(self, energies: Tensor, cost: int, most: int, tokens: int = 0) -> None:
        """``energies``, falling, are what each rank keeps, ``cost`` its parameters; rank ``most`` is dense."""
        self.left = [*(energies.sum() - energies.cumsum(0)).tolist()]  # after ranks 1, 2, ...
        self.whole, self.cost, self.most, self.tokens = float(energies.sum()), cost, most, tokens
        self.importance, self.rank = 1.0, STEP

    def lost(self, rank: int) -> float:
        return 0.0 if rank >= self.most else max(0.0, self.left[rank - 1])


class Planner:
    """Measures a dense encoder once; ``plan`` then answers for any number of parameters.

    ``dense`` is a BERT-like encoder or one with a head, ``calibration`` holds the moments of its linear layers and
    token counts, ``batches`` (``input_ids``, ``attention_mask``) are the text that sentence vectors are compared on.
    """

    def __init__(
        self,
        dense: Any,
        calibration: Calibration,
        batches: Sequence[Mapping[str, Tensor]],
        progress: Progress | None = None,
    ) -> None:
        self._dense, self._calibration, self._batches = dense, calibration, batches
        self._progress = progress or (lambda done, total, what: None)
        named = KronConfig({role: LowRankRule(STEP) for role in ROLES})
        self._modules: dict[str, Any] = {name: module for name, _, module in named_roles(dense, named)}
        self._roles = {name: role for name, role, _ in named_roles(dense, named)}
        self._table = next(name for name, role in self._roles.items() if role == "embedding")
        self._linear = {
            name: _linear_part(module, calibration, name)
            for name, module in self._modules.items()
            if name != self._table
        }
        table = self._modules[self._table].weight
        sizes = [each for each in _BANDS if sum(each) < len(table)] or [()]
        self._bands = [_band_parts(table, calibration.token_counts, each) for each in sizes]
        self.dense_params = count_parameters(dense)
        self._kept = self.dense_params - sum(module.weight.numel() for module in self._modules.values())
        self._wanted = sentence_vectors(dense, batches)
        self._embedding_importance = self._measure()

    def _measure(self) -> float:
        """Set the importance of every linear layer; return the embedding's."""
        groups: dict[str, list[str]] = {}
        for name, role in self._roles.items():
            group = re.sub(r"\.(query|key|value)$", "", name) if role == "attention" else name
            groups.setdefault(group, []).append(name)
        embedding = 1.0
        for done, (group, names) in enumerate(groups.items(), 1):
            parts = list(self._bands[-1]) if names == [self._table] else [self._linear[name] for name in names]
            for part in parts:
                part.rank = max(1, round(_PROBED * part.most))
            lost = 1 - self._agreement(self._config(self._bands[-1], only=names))["cosine"]
            share = sum(part.lost(part.rank) / part.whole for part in parts) / len(parts)
            importance = lost / max(share, 1e-6)
            if names == [self._table]:
                embedding = importance
            else:
                for part in parts:
                    part.importance = importance / (len(parts) * part.whole)
            self._progress(done, len(groups), f"measuring {group}")
        return embedding

    def plan(self, params: int) -> Plan:
        """Choose ranks and bands for at most ``params`` parameters of the whole model.

        Raises ValueError where all that stays dense, with rank ``STEP`` elsewhere, is more.
        """
        best: Plan | None = None
        width = self._modules[self._table].weight.shape[1]
        for done, (bands, weight) in enumerate([(b, w) for b in self._bands for w in _EMBEDDING_WEIGHTS], 1):
            whole = sum(part.whole for part in bands)
            for part in bands:
                part.importance = weight * self._embedding_importance / whole
            least = _allocate([*self._linear.values(), *bands], params - self._kept - len(bands) * width)
            if least > 0:
                raise ValueError(f"size: expected at least {params + least:,} parameters, got {params:,}")
            config = self._config(bands)
            found = self._agreement(config)
            if best is None or found["correlation"] > best.agreement["correlation"]:
                best = Plan(config, self._count(bands), found)
            self._progress(done, len(self._bands) * len(_EMBEDDING_WEIGHTS), "comparing plans")
        assert best is not None
        return best

    def _agreement(self, config: KronConfig) -> Mapping[str, float]:
        model, _ = kronified_copy(self._dense, config, calibration=self._calibration)
        return vector_agreement(self._wanted, sentence_vectors(model, self._batches))

    def _config(self, bands: Sequence[_Part], only: Sequence[str] | None = None) -> KronConfig:
        """The ranks of now as a configuration, of the layers ``only`` where given; layers of full rank stay dense."""
        rules: dict[str, Rule] = {}
        for name, part in self._linear.items():
            if part.rank < part.most and (only is None or name in only):
                rules[name] = LowRankRule(part.rank)
        if only is None or self._table in only:
            counted = [(part.tokens, part.rank) for part in bands]
            rules[self._table] = BandRule((*counted[:-1], (None, counted[-1][1])))
        dense = tuple(rf"(^|\.){re.escape(self._short(name))}$" for name in self._modules if name not in rules)
        roles = {self._roles[name]: rule for name, rule in rules.items()}
        # By their names from the encoder on, so that the configuration fits it with and without a head.
        layers = {self._short(name): rule for name, rule in rules.items()}
        return KronConfig(roles, name="planned", skip=dense, layers=layers)

    def _short(self, name: str) -> str:
        return name.removeprefix(f"{self._dense.base_model_prefix}.")

    def _count(self, bands: Sequence[_Part]) -> int:
        width = self._modules[self._table].weight.shape[1]
        return self._kept + len(bands) * width + sum(_cost(part) for part in (*self._linear.values(), *bands))


def _linear_part(module: Any, calibration: Calibration, name: str) -> _Part:
    moment = (
        covariance(calibration[name], calibration.input_mean[name]) if module.bias is not None else calibration[name]
    )
    rows, cols = module.weight.shape
    energies = output_directions(module.weight, moment)[1].square()
    return _Part(energies, rows + cols, rows * cols // (rows + cols))


def _band_parts(table: Tensor, counts: Tensor | None, sizes: Sequence[int]) -> list[_Part]:
    """The bands of an embedding: of ``sizes`` tokens, and the rest."""
    order, weights = frequency_order(len(table), counts)
    parts: list[_Part] = []
    start = 0
    for tokens in (*sizes, len(table) - sum(sizes)):
        members = order[start : start + tokens]
        energies = principal_energies(table.detach()[members], weights[members])
        parts.append(_Part(energies, tokens + table.shape[1], min(table.shape), tokens))
        start += tokens
    return parts


def _cost(part: _Part) -> int:
    return part.rank * part.cost


def _allocate(parts: Sequence[_Part], budget: int) -> int:
    """Give each part rank ``STEP``, then raise the rank where a parameter gains most; return what is missing, or 0."""

    def gain(part: _Part) -> float:
        return (part.lost(part.rank) - part.lost(part.rank + STEP)) * part.importance / part.cost

    for part in parts:
        part.rank = STEP
    left = budget - sum(map(_cost, parts))
    if left < 0:
        return -left
    heap = [(-gain(part), index) for index, part in enumerate(parts)]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        part = parts[index]
        if part.cost * STEP > left or part.rank >= part.most:
            continue
        part.rank += STEP
        left -= part.cost * STEP
        if part.rank < part.most:
            heapq.heappush(heap, (-gain(part), index))
    return 0
