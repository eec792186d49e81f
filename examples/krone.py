"""Relations of a knowledge graph as Kronecker products: (A_r (x) Z) h for head h and relation r.

After Demir et al., "Kronecker Decomposition for Knowledge Graph Embeddings", 2022, here with RESCAL's bilinear score
t^T W_r h (Nickel et al., "A Three-Way Model for Collective Learning on Multi-Relational Data", 2011): W_r = A_r (x) Z
with an A_r for each relation and one shared Z. ``kron_matmul`` is the product, once for each relation of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy import relative_error

from kron_kernels import kron_matmul


class KroneckerRelations(nn.Module):
    """Scores of all entities as tails, for ``heads (T,)`` and ``relations (T,)``: ``(T, entities)``.

    ``a (relations, n1, n1)`` and ``z (n2, n2)``: relation r is the matrix ``A_r (x) Z`` of the width ``n1 * n2``.
    """

    def __init__(self, entities: int, relations: int, n1: int, n2: int) -> None:
        super().__init__()
        self.entity = nn.Embedding(entities, n1 * n2)
        self.a = nn.Parameter(torch.randn(relations, n1, n1) / n1**0.5)
        self.z = nn.Parameter(torch.randn(n2, n2) / n2**0.5)

    def forward(self, heads: Tensor, relations: Tensor) -> Tensor:
        # Triples of one relation together, so that each product is one call.
        order = relations.argsort()
        present, counts = relations[order].unique_consecutive(return_counts=True)
        groups = self.entity(heads[order]).split(counts.tolist())
        moved = torch.cat([kron_matmul(h, self.a[r], self.z) for r, h in zip(present, groups, strict=True)])
        return moved[order.argsort()] @ self.entity.weight.T


def reference(model: KroneckerRelations, heads: Tensor, relations: Tensor) -> Tensor:
    """The same scores (T, entities) with every relation's matrix built."""
    weight = torch.stack([torch.kron(a, model.z) for a in model.a])
    return torch.einsum("tmn,tn->tm", weight[relations], model.entity(heads)) @ model.entity.weight.T


@torch.no_grad()
def main(entities: int = 500, relations: int = 20, n1: int = 8, n2: int = 16) -> dict[str, float]:
    torch.manual_seed(0)
    model = KroneckerRelations(entities, relations, n1, n2)
    heads, kinds = torch.randint(entities, (256,)), torch.randint(relations, (256,))
    scores, wanted = model(heads, kinds), reference(model, heads, kinds)
    error = relative_error(scores, wanted)
    dense, stored = relations * (n1 * n2) ** 2, model.a.numel() + model.z.numel()
    print(f"relations: {dense:,} -> {stored:,} parameters")
    print(f"relative error against the built matrices: {error:.1e}")
    return {"compression": dense / stored, "error": error}


if __name__ == "__main__":
    main()
