"""KAdaptation on a small random ViT: sums of Kronecker products with low-rank right factors, left factors shared.

He et al., "Parameter-efficient Model Adaptation for Vision Transformers", 2023: W + sum_i A_i (x) (u_i v_i^T), the A_i
shared by all layers. Neither u_i v_i^T nor the Kronecker product is built: the v_i take each row of a token's matrix
from n2 values to one a term, the A_i combine the rows, and one matrix product with the u_i adds them to the layer's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import relative_error, small_vit, trained_parameters


class KAdaptation(nn.Module):
    """``W x + bias + sum_i (A_i (x) U_i V_i) x`` around a frozen nn.Linear, with ``a (S, m1, n1)`` shared.

    U_i is ``(m2, rank)``, V_i ``(rank, n2)``; the U_i start at zero.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, rank: int = 1) -> None:
        super().__init__()
        terms, m1, n1 = a.shape
        self.base, self.a = base.requires_grad_(False), a
        self.u = nn.Parameter(base.weight.new_zeros(base.out_features // m1, terms * rank))
        self.v = nn.Parameter(base.weight.new_empty(terms * rank, base.in_features // n1))
        nn.init.normal_(self.v, std=self.v.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        terms, _, n1 = self.a.shape
        low = F.linear(x.unflatten(-1, (n1, -1)), self.v).unflatten(-1, (terms, -1))  # (..., n1, S, rank)
        rows = torch.einsum("smn,...nsr->...msr", self.a, low).flatten(-2)  # (..., m1, S * rank)
        y = self.base(x)
        # In place: no second tensor of the result's size.
        y.view(-1, self.u.shape[0]).addmm_(rows.reshape(-1, self.u.shape[1]), self.u.T)
        return y

    def delta_weight(self) -> Tensor:
        """What is added to W (m1 * m2, n1 * n2), built with ``torch.kron``."""
        terms = self.a.shape[0]
        u, v = self.u.unflatten(1, (terms, -1)), self.v.unflatten(0, (terms, -1))
        return sum(torch.kron(self.a[i], u[:, i] @ v[i]) for i in range(terms))


def adapt_(model: nn.Module, names: tuple[str, ...], terms: int, rank: int = 1) -> list[KAdaptation]:
    """Put KAdaptation beside every linear layer so named, with one ``a (terms, terms, terms)``; freeze the rest."""
    model.requires_grad_(False)
    a = nn.Parameter(torch.randn(terms, terms, terms) / terms)
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in names}
    adapters = {name: KAdaptation(module, a, rank) for name, module in found.items()}
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    return list(adapters.values())


@torch.no_grad()
def main(hidden: int = 192, terms: int = 4) -> dict[str, float]:
    model = small_vit(hidden)
    first, *_ = adapters = adapt_(model, ("q_proj", "v_proj"), terms)
    trained, full = trained_parameters(model), sum(each.base.weight.numel() for each in adapters)
    print(f"trained: {trained:,} parameters for {len(adapters)} layers, whose weights have {full:,}")
    x = torch.randn(2, 17, hidden)
    start = float((first(x) - first.base(x)).abs().max())
    nn.init.normal_(first.u)
    error = relative_error(first(x), F.linear(x, first.base.weight + first.delta_weight(), first.base.bias))
    print(f"relative error against the built weight: {error:.1e}; unchanged at the start: {start == 0}")
    return {"trained": trained, "error": error, "start": start}


if __name__ == "__main__":
    main()
