"""Factor shapes for a whole BERT encoder: what a choice costs, and a search for a wanted compression."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_positive
from .shapes import FactorShape, divisors, factor_shape


@dataclass(frozen=True)
class BertSize:
    """The sizes of a BERT encoder (defaults: BERT-base with its pooler) that its parameter counts follow from."""

    hidden: int = 768
    intermediate: int = 3072
    vocab: int = 30522
    layers: int = 12
    positions: int = 512
    token_types: int = 2
    pooler: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "vocab", "layers", "positions", "token_types"):
            check_positive(name, getattr(self, name))

    def dense_params(self) -> int:
        """Count the parameters of the dense encoder."""
        h, i = self.hidden, self.intermediate
        return self.kept_params() + self.vocab * h + self.layers * (4 * h * h + 2 * h * i)

    def kept_params(self) -> int:
        """Count the parameters that stay dense: biases, norms, position and type embeddings, the pooler."""
        h = self.hidden
        biases_and_norms = self.layers * (4 * h + self.intermediate + h + 4 * h)
        pooler = h * h + h if self.pooler else 0
        return (self.positions + self.token_types) * h + 2 * h + biases_and_norms + pooler


@dataclass(frozen=True)
class ModelShapes:
    """Factor shapes of every role of a BERT encoder and what the whole model then costs.

    ``params`` counts all that is stored, the dense parts included, ``compression`` is how many times fewer that is than
    in the dense encoder, and ``macs`` and ``flops`` are the multiply-adds and the operations a token of all encoder
    linear layers (a look-up in the embedding adds next to none).
    """

    attention: FactorShape
    ffn_in: FactorShape
    ffn_out: FactorShape
    embedding: FactorShape
    params: int
    compression: float
    macs: int
    flops: int


def model_shapes(
    size: BertSize,
    attention: tuple[int, int],
    ffn_in: tuple[int, int],
    ffn_out: tuple[int, int],
    embedding: tuple[int, int],
) -> ModelShapes:
    """Count the cost of an encoder whose first factors A have the shapes given, one pair for each matrix.

    ``attention`` (Q, K, V and O), ``ffn_in`` (intermediate x hidden), ``ffn_out`` (hidden x intermediate) and
    ``embedding`` (vocab x hidden). Raises ValueError for a shape that does not divide.
    """
    h, i = size.hidden, size.intermediate
    shapes = (
        factor_shape(h, h, attention),
        factor_shape(i, h, ffn_in),
        factor_shape(h, i, ffn_out),
        factor_shape(size.vocab, h, embedding),
    )
    linear_params = size.layers * (4 * shapes[0].params + shapes[1].params + shapes[2].params)
    macs = size.layers * (4 * shapes[0].macs + shapes[1].macs + shapes[2].macs)
    flops = size.layers * (4 * shapes[0].flops + shapes[1].flops + shapes[2].flops)
    params = size.kept_params() + linear_params + shapes[3].params
    return ModelShapes(*shapes, params, size.dense_params() / params, macs, flops)


def search_model_shapes(
    target_compression: float,
    size: BertSize | None = None,
    *,
    tolerance: float = 0.01,
    tiny: tuple[int, int] = (2, 16),
    limit: int | None = 20,
) -> list[ModelShapes]:
    """Search one-term shapes that compress an encoder (default BERT-base) about ``target_compression`` times.

    Searches pairs of one large and one small factor, with the small one's sides within ``tiny``, where a product is one
    matrix multiplication with a small-factor contraction. As in KroneckerBERT the small factor is on the right in
    attention and on the left in the FFN, the two FFN matrices mirror each other, and the embedding's small factor is a
    row. Keeps those whose compression is within the share ``tolerance`` of the target, fewest multiply-adds first, then
    nearest first.
    """
    if not target_compression > 1:
        raise ValueError(f"target_compression: expected a number above 1, got {target_compression}")
    size = size or BertSize()
    h, i = size.hidden, size.intermediate

    def sides(number: int) -> list[int]:
        return [d for d in divisors(number) if tiny[0] <= d <= tiny[1]]

    candidates = (
        model_shapes(size, (h // m2, h // n2), (m1, n1), (n1, m1), (size.vocab, h // k))
        for m2 in sides(h)
        for n2 in sides(h)
        for m1 in sides(i)
        for n1 in sides(h)
        for k in sides(h)
    )
    near = [c for c in candidates if abs(c.compression / target_compression - 1) <= tolerance]
    near.sort(key=lambda c: (c.macs, abs(c.compression / target_compression - 1)))
    return near[:limit]
