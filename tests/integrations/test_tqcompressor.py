"""Layers of TQCompressor's published form: what they compute, and which of their gathers fold into the factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.integrations.tqcompressor import feed_forward_from_tq, linear_from_tq

R, M1, M2, N1, N2 = 3, 7, 2, 5, 3


def kron_order(groups: int, places: int) -> Tensor:
    return (torch.randperm(groups)[:, None] * places + torch.randperm(places)).flatten()


def published(x: Tensor, a: Tensor, b: Tensor, bias: Tensor, p_inv: Tensor | None, q: Tensor | None) -> Tensor:
    """The layer as it is defined, its weight (in, out) built in full."""
    weight = sum(torch.kron(a[s].T.contiguous(), b[s]) for s in range(len(a)))
    y = (x if p_inv is None else x[:, p_inv]) @ weight
    return (y if q is None else y[:, q]) + bias


@pytest.mark.parametrize("with_input", [False, True])
@pytest.mark.parametrize("with_output", [False, True])
def test_orders_of_groups_and_places_fold(with_input, with_output):
    a, b, bias, x = (torch.randn(*s).double() for s in ((R, N1, M1), (R, M2, N2), (N1 * N2,), (7, M1 * M2)))
    p_inv, q = kron_order(M1, M2) if with_input else None, kron_order(N1, N2) if with_output else None
    layer = linear_from_tq(a, b, bias, input_order=p_inv, output_order=q)
    assert layer.dtype == torch.float64
    torch.testing.assert_close(layer(x), published(x, a, b, bias, p_inv, q))


def test_hidden_orders_of_a_feed_forward_fold_as_one():
    # Neither q nor p_inv folds by itself; what they come to together does.
    q = torch.randperm(N1 * N2)
    p_inv = q.argsort()[kron_order(N1, N2)]
    fc = {"A": torch.randn(R, N1, M1), "B": torch.randn(R, M2, N2), "b": torch.randn(N1 * N2), "q": q}
    proj = {"A": torch.randn(R, M1, N1), "B": torch.randn(R, N2, M2), "b": torch.randn(M1 * M2), "p_inv": p_inv}
    fc["p_inv"], proj["q"] = kron_order(M1, M2), kron_order(M1, M2)
    x = torch.randn(7, M1 * M2)
    hidden = published(x, fc["A"], fc["B"], fc["b"], fc["p_inv"], q).tanh()
    wanted = published(hidden, proj["A"], proj["B"], proj["b"], p_inv, proj["q"])
    first, second = feed_forward_from_tq(fc, proj)
    torch.testing.assert_close(second(first(x).tanh()), wanted)
    proj["p_inv"] = torch.arange(N1 * N2).roll(1)
    with pytest.raises(ValueError, match="c_proj: input_order: expected an order of whole groups of 3"):
        feed_forward_from_tq(fc, proj)
    with pytest.raises(ValueError, match=r"c_proj: p_inv: expected a permutation of 15 channels, got shape \(4,\)"):
        feed_forward_from_tq(fc, {**proj, "p_inv": torch.arange(4)})
    with pytest.raises(ValueError, match=r"c_fc: q: expected a permutation of 15 channels, got shape \(4,\)"):
        feed_forward_from_tq({**fc, "q": torch.arange(4)}, proj)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_order": torch.arange(14).roll(1)}, "input_order: expected an order of whole groups of 2 .* got one"),
        ({"output_order": torch.zeros(15)}, r"output_order: expected a permutation of 15 channels, got shape \(15,\)"),
        ({"bias": torch.zeros(8)}, r"bias: expected \(15,\), got \(8,\)"),
    ],
)
def test_what_does_not_fold_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        linear_from_tq(torch.randn(R, N1, M1), torch.randn(R, M2, N2), **options)


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"a, b: expected \(r, n1, m1\) and \(r, m2, n2\), got \(2, 5, 7\) and \(3, 2"):
        linear_from_tq(torch.randn(2, N1, M1), torch.randn(R, M2, N2))
