"""The nearest Kronecker product: optimal, exact at full terms, in every layout, and clear about bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.factorize import mean_corrected_bias, nearest_kronecker, vanloan
from kron_kernels.schemas.reference import kron_weight

# (m, n, a_shape): the small side is b, a, a row, and neither; all-of-one-side shapes at the end.
LAYOUTS = [
    (12, 20, (6, 10)),
    (24, 12, (4, 2)),
    (30, 16, (30, 4)),
    (24, 24, (4, 6)),
    (12, 20, (12, 20)),
    (12, 20, (1, 1)),
]


def rearranged(weight: Tensor, a_shape: tuple[int, int]) -> Tensor:
    """R (m1*n1, m2*n2), one row a block of ``weight``, by its definition."""
    (m1, n1), (m2, n2) = a_shape, (weight.shape[0] // a_shape[0], weight.shape[1] // a_shape[1])
    blocks = [weight[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].flatten() for i in range(m1) for j in range(n1)]
    return torch.stack(blocks)


@pytest.mark.parametrize(("m", "n", "a_shape"), LAYOUTS)
def test_full_terms_are_exact(m: int, n: int, a_shape: tuple[int, int]) -> None:
    weight = torch.randn(m, n, dtype=torch.float64)
    terms = min(a_shape[0] * a_shape[1], m * n // (a_shape[0] * a_shape[1]))
    factors = nearest_kronecker(weight, a_shape, terms)
    assert factors.a.shape == (terms, *a_shape)
    assert factors.b.shape == (terms, m // a_shape[0], n // a_shape[1])
    torch.testing.assert_close(kron_weight(factors.a, factors.b), weight, rtol=0, atol=1e-13)
    assert factors.relative_error < 1e-13


@pytest.mark.parametrize(("m", "n", "a_shape"), LAYOUTS[:4])
def test_matches_the_singular_value_decomposition(m: int, n: int, a_shape: tuple[int, int]) -> None:
    weight, terms = torch.randn(m, n, dtype=torch.float64), 3
    factors = nearest_kronecker(weight, a_shape, terms)
    left, values, right = torch.linalg.svd(rearranged(weight, a_shape), full_matrices=False)
    best = (left[:, :terms] * values[:terms]) @ right[:terms]
    torch.testing.assert_close(rearranged(kron_weight(factors.a, factors.b), a_shape), best)
    assert factors.relative_error == pytest.approx(float(values[terms:].norm() / values.norm()))
    for side in (factors.a, factors.b):
        torch.testing.assert_close(side.flatten(1) @ side.flatten(1).T, torch.diag(values[:terms]))


def test_recovers_the_factors_of_a_kronecker_product() -> None:
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    b *= torch.sign(b.flatten()[b.abs().argmax()])
    factors = nearest_kronecker(torch.kron(a, b), (6, 4))
    scale = (a.norm() / b.norm()).sqrt()
    torch.testing.assert_close(factors.a[0], a / scale)
    torch.testing.assert_close(factors.b[0], b * scale)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 20, dtype=torch.float64)
    whole = [nearest_kronecker(weight, shape, 2) for shape in ((12, 10), (2, 2))]
    monkeypatch.setattr(vanloan, "_BLOCK_ENTRIES", 50)
    for shape, before in zip(((12, 10), (2, 2)), whole, strict=True):
        after = nearest_kronecker(weight, shape, 2)
        torch.testing.assert_close(kron_weight(after.a, after.b), kron_weight(before.a, before.b))


def test_large_balanced_shapes_by_lanczos_equal_the_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(96, 96), torch.kron(torch.randn(12, 8), torch.randn(8, 12))]
    dense = [nearest_kronecker(weight, (12, 8), 2).relative_error for weight in weights]
    monkeypatch.setattr(vanloan, "_DENSE_EIGH_LIMIT", 8)
    few = [nearest_kronecker(weight, (12, 8), 2).relative_error for weight in weights]
    assert few == pytest.approx(dense, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_returns_the_weights_dtype(dtype: torch.dtype) -> None:
    weight = torch.kron(torch.randn(6, 4).double(), torch.randn(2, 4).double()).to(dtype)
    factors = nearest_kronecker(weight, (6, 4), 2)
    assert factors.a.dtype == factors.b.dtype == dtype
    assert factors.a.is_contiguous()
    assert factors.b.is_contiguous()
    # The rounding of the factors themselves counts: nothing smaller may be claimed.
    exact = weight.double()
    lost = (exact - kron_weight(factors.a.double(), factors.b.double())).norm() / exact.norm()
    assert factors.relative_error == pytest.approx(float(lost), rel=1e-2)
    assert factors.relative_error < 4 * torch.finfo(dtype).eps


def test_fp32_keeps_small_singular_values() -> None:
    u, _ = torch.linalg.qr(torch.randn(200, 2, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))
    small = 1e-5
    weight = (u * torch.tensor([1.0, small])) @ v.T
    # Rows of R are the 1 x 6 blocks of W (200, 6), so W is R here.
    factors = nearest_kronecker(weight.float(), (200, 1), 2)
    assert float(factors.b[1].norm() ** 2) == pytest.approx(small, rel=1e-3)


def test_zero_and_low_rank_weights() -> None:
    zero = nearest_kronecker(torch.zeros(8, 6), (4, 3), 2)
    assert zero.relative_error == 0
    assert not zero.a.any()
    assert not zero.b.isnan().any()
    single = nearest_kronecker(torch.ones(8, 6), (4, 3), 3)
    torch.testing.assert_close(kron_weight(single.a, single.b), torch.ones(8, 6))


def test_leaves_the_random_state_and_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vanloan, "_DENSE_EIGH_LIMIT", 8)
    weight = torch.nn.Parameter(torch.randn(64, 64).T)
    before, state = weight.clone(), torch.get_rng_state()
    first, second = nearest_kronecker(weight, (8, 8)), nearest_kronecker(weight, (8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, before)
    assert torch.equal(first.a, second.a)
    assert not first.a.requires_grad


def test_mean_corrected_bias() -> None:
    weight, bias, x = torch.randn(12, 20), torch.randn(12), torch.randn(300, 20) + 2
    factors = nearest_kronecker(weight, (6, 4), 2)
    corrected = mean_corrected_bias(weight, factors, bias, x.mean(0))
    difference = (x @ weight.T + bias) - (x @ kron_weight(factors.a, factors.b).T + corrected)
    torch.testing.assert_close(difference.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    without = mean_corrected_bias(weight.bfloat16(), factors, None, x.mean(0))
    assert (without.dtype, without.shape) == (torch.bfloat16, (12,))
    with pytest.raises(ValueError, match=r"input_mean: expected shape \(20,\), got \(8,\)"):
        mean_corrected_bias(weight, factors, None, torch.ones(8))
    with pytest.raises(ValueError, match=r"bias: expected shape \(12,\), got \(6,\)"):
        mean_corrected_bias(weight, factors, torch.ones(6), x.mean(0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(0, 6)}, ValueError, r"weight: expected a non-empty matrix .* got shape \(0, 6\)"),
        (
            {"weight": torch.ones(8, 6, dtype=torch.int64)},
            TypeError,
            "weight: expected a floating-point .* torch.int64",
        ),
        ({"weight": torch.full((8, 6), torch.nan)}, ValueError, "weight: expected finite values, got NaN or inf"),
        ({"a_shape": (3, 3)}, ValueError, r"a_shape: expected \(m1, n1\) that divides \(8, 6\), got \(3, 3\)"),
        ({"a_shape": (0, 3)}, ValueError, r"a_shape: expected .* got \(0, 3\)"),
        ({"a_shape": (4, 3, 1)}, TypeError, r"a_shape: expected two ints \(m1, n1\), got \(4, 3, 1\)"),
        ({"terms": 0}, ValueError, "terms: expected a positive int, got 0"),
        ({"terms": 5}, ValueError, r"terms: expected at most min\(m1\*n1, m2\*n2\) = 4, got 5"),
        ({"input_moment": torch.eye(5)}, ValueError, r"input_moment: expected shape \(6, 6\), got \(5, 5\)"),
        ({"input_moment": torch.ones(6, 6).tril()}, ValueError, "input_moment: expected a symmetric .* differ by 1"),
        ({"input_moment": torch.full((6, 6), torch.inf)}, ValueError, "input_moment: expected finite values"),
        ({"input_moment": torch.zeros(6, 6)}, ValueError, "input_moment: expected a positive trace, got 0"),
        (
            {"input_moment": torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1]))},
            ValueError,
            "one with a negative eigenvalue",
        ),
        ({"input_moment": torch.eye(6), "rounds": -1}, ValueError, "rounds: expected an int of at least 0, got -1"),
    ],
)
def test_bad_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"weight": torch.ones(8, 6), "a_shape": (4, 3), **arguments}
    with pytest.raises(error, match=message):
        nearest_kronecker(**given)  # type: ignore[arg-type]
