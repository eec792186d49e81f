"""An embedding of order 3: a word is a sum of Kronecker products of three gathered vectors, one for each morpheme.

Gan et al., "MorphTE: Injecting Morphology in Tensorized Embeddings", 2022. A small table of vectors is stored for
each of the ``rank`` terms. Neither the table of the words nor a word's separate terms are built: the last product sums
over the terms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy import relative_error


class MorphemeEmbedding(nn.Module):
    """Rows ``sum_r f_r(i) (x) f_r(j) (x) f_r(k)``, cut to ``dim``, of words with morphemes ``(i, j, k)``.

    ``morphemes (V, 3)`` has the morphemes of each word; ``table (M, rank, q)`` their vectors, of the least ``q`` with
    ``q**3 >= dim``. ``ids (...)`` give ``(..., dim)``.
    """

    def __init__(self, morphemes: Tensor, dim: int, rank: int) -> None:
        super().__init__()
        self.dim = dim
        side = next(q for q in range(1, dim + 1) if q**3 >= dim)
        self.register_buffer("morphemes", morphemes)
        # Entries of a row are sums of ``rank`` products of three: their variance is 1.
        self.table = nn.Parameter(torch.randn(int(morphemes.max()) + 1, rank, side) * rank ** (-1 / 6))

    def forward(self, ids: Tensor) -> Tensor:
        first, second, third = self.table[self.morphemes[ids]].unbind(-3)  # (..., rank, q) each
        pairs = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)  # (..., rank, q * q)
        return (pairs.mT @ third).flatten(-2)[..., : self.dim]  # (..., q * q, q)


def reference(layer: MorphemeEmbedding) -> Tensor:
    """The table of all words (V, dim), term by term with ``torch.kron``."""
    rows = []
    for i, j, k in layer.morphemes.tolist():
        terms = zip(layer.table[i], layer.table[j], layer.table[k], strict=True)
        rows.append(sum(torch.kron(torch.kron(f, g), h) for f, g, h in terms)[: layer.dim])
    return torch.stack(rows)


@torch.no_grad()
def main(words: int = 2000, morphemes: int = 300, dim: int = 200, rank: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    layer = MorphemeEmbedding(torch.randint(morphemes, (words, 3)), dim, rank)
    ids = torch.randint(words, (8, 32))
    error = relative_error(layer(ids), reference(layer)[ids])
    stored = layer.table.numel()
    print(f"{words * dim:,} -> {stored:,} parameters (and {layer.morphemes.numel():,} indices)")
    print(f"relative error against the table built with torch.kron: {error:.1e}")
    return {"compression": words * dim / stored, "error": error}


if __name__ == "__main__":
    main()
