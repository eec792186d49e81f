"""The search for orders: it never loses, finds structure that an order hides, and names bad input."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.factorize import nearest_kronecker
from kron_kernels.factorize.permutations import OrderedWeight, search_permutations


def hidden_product(m: int, n: int, b: tuple[int, int], noise: float) -> torch.Tensor:
    """A (x) B with B (m, n) of ``b``, in random order, with noise."""
    weight = torch.kron(torch.randn(m // b[0], n // b[1]), torch.randn(b)) + noise * torch.randn(m, n)
    return weight[torch.randperm(m)][:, torch.randperm(n)]


WEIGHTS = {
    "random": lambda: torch.randn(96, 64),
    "low-rank": lambda: torch.randn(96, 6) @ torch.randn(6, 64),
    "hidden-product": lambda: hidden_product(96, 64, (4, 2), 0.05),
}


@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_errors_fall_and_are_those_of_the_permuted_weight(name, terms):
    weight = WEIGHTS[name]()
    places = {"rows": (("r", 0),), "columns": (("c", 0),)}
    found = search_permutations([OrderedWeight(weight, (24, 32), terms, **places)], {"r": 96, "c": 64})
    permuted = weight[found.permutations["r"]][:, found.permutations["c"]]
    fits = [nearest_kronecker(each, (24, 32), terms).relative_error for each in (weight, permuted)]
    assert [*found.errors_before, *found.errors_after] == pytest.approx(fits, abs=1e-4)
    assert fits[1] < (0.95 if name == "random" else 0.8) * fits[0]


def test_an_order_that_several_weights_share_serves_their_sum():
    # Only the second has partners to find.
    second = torch.kron(torch.randn(24, 16), torch.randn(1, 2)) + 0.05 * torch.randn(24, 32)
    weights = [
        OrderedWeight(torch.randn(32, 20), (16, 20), rows=(("hidden", 0),)),
        OrderedWeight(second[:, torch.randperm(32)], (24, 16), columns=(("hidden", 0),)),
    ]
    found = search_permutations(weights, {"hidden": 32}, rounds=30)
    sums = [sum(1 - error**2 for error in errors) for errors in (found.errors_before, found.errors_after)]
    assert sums[1] > sums[0] + 0.1
    assert found.errors_after[1] < 0.8 * found.errors_before[1]
    assert torch.equal(found.permutations["hidden"].sort().values, torch.arange(32))


def test_channels_stay_in_their_blocks_and_offsets_hold():
    weight = torch.randn(20, 48)
    places = (("heads", 24),)
    found = search_permutations([OrderedWeight(weight, (20, 24), columns=places)], {"heads": 24}, blocks={"heads": 8})
    order = found.permutations["heads"]
    assert torch.equal(order // 8, torch.arange(24) // 8)
    assert not torch.equal(order, torch.arange(24))
    assert found.errors_after[0] < 0.98 * found.errors_before[0]
    permuted = torch.cat([weight[:, :24], weight[:, 24:][:, order]], 1)
    assert nearest_kronecker(permuted, (20, 24)).relative_error == pytest.approx(found.errors_after[0], abs=1e-4)


def test_the_search_is_deterministic_and_leaves_inputs_and_the_global_generator_alone():
    weight = torch.randn(24, 24)
    given, state = weight.clone(), torch.get_rng_state()
    runs = [search_permutations([OrderedWeight(weight, (12, 12), rows=(("r", 0),))], {"r": 24}) for _ in range(2)]
    assert torch.equal(weight, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].permutations["r"], runs[1].permutations["r"])


SQUARE = torch.randn(8, 8)


@pytest.mark.parametrize(
    ("options", "sizes", "match"),
    [
        ({"terms": 5}, {}, r"terms: expected at most .* = 4, got 5"),
        ({"rows": (("r", 0),)}, {}, r"weights\[0\].rows: r from 0 on does not fit 8 rows"),
        ({"rows": (("r", 4),)}, {"r": 8}, r"weights\[0\].rows: r from 4 on does not fit"),
        ({"rows": (("r", 0),), "columns": (("r", 0),)}, {"r": 8}, r"weights\[0\]: r orders both rows and columns"),
        ({"rows": (("r", 0),)}, {"r": 7}, "blocks: expected r of 7 positions to be whole runs of 2"),
    ],
)
def test_bad_input(options, sizes, match):
    with pytest.raises(ValueError, match=match):
        search_permutations([OrderedWeight(torch.randn(8, 8), (4, 4), **options)], sizes)


def test_large_right_factors_are_an_error():
    with pytest.raises(ValueError, match=r"weights\[0\]: .* right factor of at most 256.* got 1024"):
        search_permutations([OrderedWeight(torch.randn(64, 64), (2, 2))], {})
