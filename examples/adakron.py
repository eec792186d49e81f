"""AdaKron: an adapter whose hidden vector is, for each token, the Kronecker product of the outputs of two small nets.

After Braga et al., "AdaKron: an Adapter-based Parameter Efficient Model Tuning with Kronecker Product", 2024. For a
token x the nets give u (n1) and v (n2); u (x) v has n1 * n2 values and is projected to the width of the model. Here the
projection is itself a sum of Kronecker products, so ``kron_addmm`` adds it to the frozen block's output in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy import relative_error, trained_parameters

from kron_kernels import kron_addmm
from kron_kernels.nn import Shapes


class AdaKron(nn.Module):
    """``block(x) + (sum_s A_s (x) B_s)(u (x) v)`` around a frozen block, with ``u = left(x)`` and ``v = right(x)``.

    ``shapes`` is ``((m1, n1), (m2, n2))`` with ``m1 * m2`` outputs of the block; the B_s start at zero.
    """

    def __init__(self, block: nn.Module, in_features: int, shapes: Shapes, terms: int = 1) -> None:
        super().__init__()
        (m1, n1), (m2, n2) = shapes
        self.block = block.requires_grad_(False)
        self.left, self.right = (nn.Sequential(nn.Linear(in_features, n), nn.GELU()) for n in (n1, n2))
        self.a = nn.Parameter(torch.randn(terms, m1, n1) / n1**0.5)
        self.b = nn.Parameter(torch.zeros(terms, m2, n2))

    def forward(self, x: Tensor) -> Tensor:
        outer = (self.left(x).unsqueeze(-1) * self.right(x).unsqueeze(-2)).flatten(-2)  # (..., n1 * n2)
        return kron_addmm(self.block(x), outer, self.a, self.b)


def reference(layer: AdaKron, x: Tensor) -> Tensor:
    """The same output, token by token with ``torch.kron``, the projection built. ``x (T, in_features)``."""
    projection = sum(torch.kron(a, b) for a, b in zip(layer.a, layer.b, strict=True))
    added = [projection @ torch.kron(u, v) for u, v in zip(layer.left(x), layer.right(x), strict=True)]
    return layer.block(x) + torch.stack(added)


@torch.no_grad()
def main(hidden: int = 192) -> dict[str, float]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
    layer = AdaKron(block, hidden, ((hidden // 16, hidden // 16), (16, 16)), terms=2)
    x = torch.randn(64, hidden)
    start = float((layer(x) - block(x)).abs().max())
    nn.init.normal_(layer.b)
    error = relative_error(layer(x), reference(layer, x))
    trained = trained_parameters(layer)
    print(f"trained: {trained:,} parameters beside a block of {sum(p.numel() for p in block.parameters()):,}")
    print(f"relative error against torch.kron for each token: {error:.1e}; unchanged at the start: {start == 0}")
    return {"trained": trained, "error": error, "start": start}


if __name__ == "__main__":
    main()
