"""A gated mixture of Kronecker products of unequal shapes beside a frozen layer.

After Sadeghi et al., "MoKA: Mixture of Kronecker Adapters", 2025. Terms of one shape are summed inside ``kron_addmm``;
terms of several shapes are a list of pairs, each added in place to what the layer gives. A gate multiplies the
smaller factor, which costs nothing for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import relative_error, trained_parameters

from kron_kernels import kron_addmm_
from kron_kernels.nn import Shapes


class KroneckerMixture(nn.Module):
    """``W x + bias + sum_i g_i (A_i (x) B_i) x`` around a frozen nn.Linear, with ``g = softmax(gates)``.

    ``shapes`` holds ``((m1, n1), (m2, n2))`` of every term, each a product of the layer's size; the B_i start at zero.
    """

    def __init__(self, base: nn.Linear, shapes: list[Shapes]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.ParameterList(torch.randn(a) / a[1] ** 0.5 for a, _ in shapes)
        self.b = nn.ParameterList(torch.zeros(b) for _, b in shapes)
        self.gates = nn.Parameter(torch.zeros(len(shapes)))

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs, with their gates."""
        gates = self.gates.softmax(0)
        return [
            (gate * a, b) if a.numel() < b.numel() else (a, gate * b)
            for gate, a, b in zip(gates, self.a, self.b, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for a, b in self.terms():
            y = kron_addmm_(y, x, a, b)
        return y


@torch.no_grad()
def main(hidden: int = 192) -> dict[str, float]:
    torch.manual_seed(0)
    half, eighth = hidden // 2, hidden // 8
    shapes = [((half, half), (2, 2)), ((8, 8), (eighth, eighth)), ((2, 4), (half, hidden // 4))]
    layer = KroneckerMixture(nn.Linear(hidden, hidden), shapes)
    x = torch.randn(64, hidden)
    start = float((layer(x) - layer.base(x)).abs().max())
    for b in layer.b:
        nn.init.normal_(b)
    built = F.linear(x, layer.base.weight + sum(torch.kron(a, b) for a, b in layer.terms()), layer.base.bias)
    error, trained = relative_error(layer(x), built), trained_parameters(layer)
    print(f"trained: {trained:,} parameters beside a weight of {hidden * hidden:,}")
    print(f"relative error against the built weight: {error:.1e}; unchanged at the start: {start == 0}")
    return {"trained": trained, "error": error, "start": start}


if __name__ == "__main__":
    main()
