"""Orders of rows and columns that make weights nearer to sums of Kronecker products.

A Kronecker product ties rows to each other by their place, and a network does not care in which order its hidden units
stand: permuting them, in every weight that touches them, changes nothing but how well the weights factor (Abronin et
al., "TQCompressor", 2024). The search works on all weights that share an order at once.

With the m2 x n2 blocks of W as the rows of R (Van Loan and Pitsianis, 1993) and V (m2*n2, S) their leading right
singular vectors, the S terms capture ||R V||^2. For a fixed V, row r of W adds U_k[r] (n1, S) to its block row when it
stands in slot k of m2, and a block row's energy is || sum of its U ||^2. Among positions of which no two are in one
block row the energy of each depends on its own row alone, so all gains of exchanging two of them come from a few matrix
products, disjoint exchanges add up, and none can lower the energy; neither can a new V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_a_shape, check_positive, check_terms, check_weight
from .vanloan import gram_matrix, leading_eigenvectors

# The right factor's entries: each search step decomposes a Gram matrix of this many rows.
LARGEST_RIGHT_FACTOR = 256
# An exchange must gain more than this share of a weight's energy; less is rounding.
_LEAST_GAIN = 1e-9

# An order by its name, and the first row or column that it orders.
Place = tuple[str, int]


@dataclass(frozen=True)
class OrderedWeight:
    """A weight (m, n) to be factored by ``terms`` pairs with A of ``a_shape``, and the orders on its rows and columns.

    ``rows`` and ``columns`` say which order covers what: ``("hidden", 0)`` the rows from 0 on, as many as it has.
    """

    weight: Tensor
    a_shape: tuple[int, int]
    terms: int = 1
    rows: tuple[Place, ...] = ()
    columns: tuple[Place, ...] = ()


@dataclass(frozen=True)
class PermutationSearch:
    """The orders found, and the relative Frobenius error of each weight's nearest factors before and after.

    ``permutations[name]`` (size,) int64: what stands at position i afterwards stood at ``permutations[name][i]``.
    """

    permutations: dict[str, Tensor]
    errors_before: tuple[float, ...]
    errors_after: tuple[float, ...]


@torch.no_grad()
def search_permutations(
    weights: Sequence[OrderedWeight],
    sizes: Mapping[str, int],
    *,
    blocks: Mapping[str, int] | None = None,
    rounds: int = 10,
    seed: int = 0,
) -> PermutationSearch:
    """Search orders of rows and columns under which the weights' nearest Kronecker products capture more of them.

    Maximises the sum, over the weights, of the share of the squared norm that ``terms`` products capture, by exchanges
    of two positions at a time, ``rounds`` sweeps over all orders; the sum never falls. A local search from the present
    order: other seeds find other orders.

    Args:
        weights: what is to be factored. The right factor must be the tiny one, of at most 256 entries.
        sizes: how many positions each order has.
        blocks: for orders that may exchange only inside runs of this many positions (the channels of a head).
        rounds: sweeps at most; the search ends with the first that brings nothing.
        seed: of the search's own random generator; the global one is left alone.

    Raises:
        ValueError: shapes or terms that do not fit, an order of unknown size or beyond a weight, one that covers both
            rows and columns of a weight, a right factor of more than 256 entries; blocks that do not divide.
    """
    check_positive("rounds", rounds)
    blocks = dict(blocks or {})
    states = [_State(index, weight, sizes) for index, weight in enumerate(weights)]
    generator = torch.Generator().manual_seed(seed)
    permutations = {name: torch.arange(size) for name, size in sizes.items()}
    users = {name: [(state, *use) for state in states for use in state.uses(name)] for name in sizes}
    strides = {name: math.lcm(1, *(state.slots(side) for state, side, _ in found)) for name, found in users.items()}
    for name, size in sizes.items():
        block = blocks.setdefault(name, size)
        if size % strides[name] or block < 1 or size % block:
            raise ValueError(
                f"blocks: expected {name} of {size} positions to be whole runs of {strides[name]} and of its block, "
                f"got a block of {block}"
            )
    before = tuple(state.error() for state in states)
    for _ in range(rounds):
        exchanged = 0
        for name, found in users.items():
            if all(state.slots(side) == 1 for state, side, _ in found):
                continue  # an order of whole blocks changes nothing
            for _ in range(strides[name]):
                runs = sizes[name] // strides[name]
                offsets = torch.randint(strides[name], (runs,), generator=generator)
                positions = torch.arange(runs) * strides[name] + offsets
                gains = [state.gains(side, start + positions) for state, side, start in found]
                left, right = _exchanges(torch.stack(gains).sum(0), positions // blocks[name])
                exchanged += len(left)
                left, right = positions[left], positions[right]
                order = permutations[name]
                order[left], order[right] = order[right], order[left]
                for state, side, start in found:
                    state.exchange(side, start + left, start + right)
            for state in {id(state): state for state, _, _ in found}.values():
                state.refresh()
        if not exchanged:
            break
    return PermutationSearch(permutations, before, tuple(state.error() for state in states))


class _State:
    """A weight in its present order and the leading right singular vectors of its blocks."""

    def __init__(self, index: int, given: OrderedWeight, sizes: Mapping[str, int]) -> None:
        check_weight(given.weight)
        m, n = given.weight.shape
        m1, n1 = check_a_shape(given.a_shape, m, n)
        self._b_shape = (m // m1, n // n1)
        entries = self._b_shape[0] * self._b_shape[1]
        check_terms(given.terms, min(m1 * n1, entries))
        if entries > LARGEST_RIGHT_FACTOR:
            raise ValueError(
                f"weights[{index}]: expected a right factor of at most {LARGEST_RIGHT_FACTOR} entries, got {entries}"
            )
        self._terms = given.terms
        self._places = {"rows": given.rows, "columns": given.columns}
        for side, size in (("rows", m), ("columns", n)):
            for name, start in self._places[side]:
                if name not in sizes or not 0 <= start <= size - sizes[name] or start % self.slots(side):
                    raise ValueError(f"weights[{index}].{side}: {name} from {start} on does not fit {size} {side}")
        if both := {name for name, _ in given.rows} & {name for name, _ in given.columns}:
            raise ValueError(f"weights[{index}]: {', '.join(both)} orders both rows and columns")
        weight = given.weight.detach().to(torch.float32)
        if self._b_shape[0] == 1 and not given.rows and m > n:
            # With whole rows in every block only the columns' inner products count.
            weight, m1 = torch.linalg.qr(weight, mode="r").R, n
        self._a_shape = (m1, n1)
        self._weight = weight / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)
        self.refresh()

    def slots(self, side: str) -> int:
        """How many rows, or columns, a block has."""
        return self._b_shape[side == "columns"]

    def uses(self, name: str) -> list[tuple[str, int]]:
        return [(side, start) for side, places in self._places.items() for each, start in places if each == name]

    def refresh(self) -> None:
        gram = gram_matrix(self._weight, self._a_shape, False)
        self._basis = leading_eigenvectors(gram, self._terms)
        self._captured = float(((gram @ self._basis) * self._basis).sum() / gram.trace().clamp(min=1e-300))

    def error(self) -> float:
        return max(0.0, 1 - self._captured) ** 0.5

    def gains(self, side: str, positions: Tensor) -> Tensor:
        """Energy [r, p] of the block row of ``positions[p]`` with the row at ``positions[r]`` in its place."""
        basis = self._basis.float().view(*self._b_shape, -1)
        weight = self._weight
        if side == "columns":
            weight, basis = weight.T, basis.transpose(0, 1)
        slots = basis.shape[0]
        rows = weight.unflatten(1, (-1, basis.shape[1]))  # (m, n1, n2)
        mine, group, slot = rows[positions], positions // slots, positions % slots
        gain = weight.new_empty(len(positions), len(positions))
        for k in range(slots):
            chosen = slot == k
            # What the other slots of these block rows add up to, (chosen, n1, S).
            rest = torch.zeros(int(chosen.sum()), rows.shape[1], self._terms)
            for other in range(slots):
                if other != k:
                    rest += rows[group[chosen] * slots + other] @ basis[other]
            own = (mine @ basis[k]).flatten(1)
            gain[:, chosen] = own.square().sum(1, keepdim=True) + 2 * own @ rest.flatten(1).T
        return gain

    def exchange(self, side: str, left: Tensor, right: Tensor) -> None:
        weight = self._weight if side == "rows" else self._weight.T
        weight[left], weight[right] = weight[right], weight[left]


def _exchanges(gain: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Disjoint pairs of positions of one block whose exchange gains, each time those that are each other's best."""
    own = gain.diagonal()
    profit = gain + gain.T - own[:, None] - own[None, :]
    profit[block[:, None] != block[None, :]] = -math.inf
    index = torch.arange(len(profit))
    lefts, rights = [index[:0]], [index[:0]]
    while True:
        best, partner = profit.max(1)
        mutual = (partner[partner] == index) & (best > _LEAST_GAIN) & (index < partner)
        if not mutual.any():
            return torch.cat(lefts), torch.cat(rights)
        lefts.append(index[mutual])
        rights.append(partner[mutual])
        taken = torch.cat([lefts[-1], rights[-1]])
        profit[taken] = -math.inf
        profit[:, taken] = -math.inf
