"""What a dense layer becomes: a sum of Kronecker products, two thin matrices, an embedding in bands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..nn import Shape, Shapes


def is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_keys(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {data!r}")
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; expected {', '.join(sorted(known))}")


@dataclass(frozen=True)
class ShapeRule:
    """The shape of one factor, ``a`` (m1, n1) or ``b`` (m2, n2), and the number of terms; the other factor follows.

    Giving the small factor makes one rule fit every model size. For embeddings ``b`` must be a row vector (1, k).
    """

    a: Shape | None = None
    b: Shape | None = None
    terms: int = 1

    def __post_init__(self) -> None:
        if (self.a is None) == (self.b is None):
            raise ValueError(f"rule: expected exactly one of a and b, got a={self.a}, b={self.b}")
        if not is_positive(self.terms):
            raise ValueError(f"terms: expected an integer of at least 1, got {self.terms!r}")
        name, shape = ("a", self.a) if self.b is None else ("b", self.b)
        if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(map(is_positive, shape)):
            raise ValueError(f"{name}: expected two positive integers, got {shape!r}")
        object.__setattr__(self, name, tuple(shape))

    def resolve(self, rows: int, cols: int) -> Shapes:
        """((m1, n1), (m2, n2)) for a (rows, cols) weight; ValueError where the given factor does not divide it."""
        given = self.a or self.b
        assert given is not None
        if rows % given[0] or cols % given[1]:
            name = "a" if self.b is None else "b"
            raise ValueError(f"{name}: a factor of {given[0]}x{given[1]} does not divide a weight of {rows}x{cols}")
        other = (rows // given[0], cols // given[1])
        return (other, given) if self.a is None else (given, other)

    def to_dict(self) -> dict[str, Any]:
        shape = {"a": list(self.a)} if self.a is not None else {"b": list(self.b or ())}
        return {**shape, "terms": self.terms}

    def __str__(self) -> str:
        name, shape = ("a", self.a) if self.a is not None else ("b", self.b)
        return f"{name}={shape[0]}x{shape[1]}" + (f", terms={self.terms}" if self.terms > 1 else "")  # type: ignore[index]


@dataclass(frozen=True)
class LowRankRule:
    """A linear layer as two thin matrices, or an embedding as one table and one projection, of ``rank``."""

    rank: int

    def __post_init__(self) -> None:
        if not is_positive(self.rank):
            raise ValueError(f"rank: expected a positive integer, got {self.rank!r}")

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def __str__(self) -> str:
        return f"rank {self.rank}"


@dataclass(frozen=True)
class BandRule:
    """An embedding in bands of falling frequency: pairs (tokens, rank), the last with None for all that is left."""

    bands: tuple[tuple[int | None, int], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.bands, (tuple, list)) or not self.bands:
            raise ValueError(f"bands: expected pairs (tokens, rank), got {self.bands!r}")
        for index, band in enumerate(self.bands):
            last = index == len(self.bands) - 1
            if (
                not isinstance(band, (tuple, list))
                or len(band) != 2
                or not is_positive(band[1])
                or not (band[0] is None if last else is_positive(band[0]))
            ):
                raise ValueError(f"bands: expected pairs (tokens, rank), the last (None, rank), got {self.bands!r}")
        object.__setattr__(self, "bands", tuple((tokens, rank) for tokens, rank in self.bands))

    def resolve(self, rows: int) -> tuple[tuple[int, int], ...]:
        """(tokens, rank) of every band of a table of ``rows``; ValueError where they are more than that."""
        counted = [(tokens, rank) for tokens, rank in self.bands if tokens is not None]
        rest = rows - sum(tokens for tokens, _ in counted)
        if rest < 1:
            raise ValueError(f"bands: expected fewer tokens than the vocabulary's {rows}, got {rows - rest}")
        return (*counted, (rest, self.bands[-1][1]))

    def to_dict(self) -> dict[str, Any]:
        return {"bands": [list(band) for band in self.bands]}

    def __str__(self) -> str:
        return "bands " + ", ".join(f"{'rest' if tokens is None else tokens}x{rank}" for tokens, rank in self.bands)


Rule = ShapeRule | LowRankRule | BandRule


def rule_from_dict(where: str, data: Mapping[str, Any]) -> Rule:
    """Read what a rule's ``to_dict`` wrote; ValueError for unknown keys."""
    check_keys(where, data, {"a", "b", "terms", "rank", "bands"})
    kind: Any = LowRankRule if "rank" in data else BandRule if "bands" in data else ShapeRule
    try:
        return kind(**data)
    except TypeError:
        raise ValueError(f"{where}: expected a or b with terms, or rank, or bands, got {dict(data)!r}") from None
