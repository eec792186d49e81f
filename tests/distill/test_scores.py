"""The attention terms against the scores and probabilities of whole layers, built in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kron_kernels.distill import scores
from kron_kernels.distill.scores import attention_kl, score_mse

HEADS = 3
# Length and head size: through the scores of a layer, at the border, and through Gram matrices.
SIZES = ((5, 8), (12, 4), (40, 4))


def operands(length: int, head_size: int, apart: float = 1.0) -> list[Tensor]:
    """Student's query and key, then the teacher's, in float64; ``apart`` is how far the teacher's are off."""
    shape = (2, length, HEADS * head_size)
    query, key = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    far = [each + apart * torch.randn_like(each) for each in (query, key)]
    return [query.requires_grad_(), key.requires_grad_(), *far]


def rounded(inputs: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The operands in ``dtype``, and the same values in float64."""
    given = [each.detach().to(dtype).requires_grad_(each.requires_grad) for each in inputs]
    return given, [each.detach().double().requires_grad_(each.requires_grad) for each in given]


def padded(length: int) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return mask


def whole_scores(query: Tensor, key: Tensor) -> Tensor:
    query, key = [each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (query, key)]
    return query @ key.mT / query.shape[-1] ** 0.5


def plain_mse(query: Tensor, key: Tensor, query_t: Tensor, key_t: Tensor, mask: Tensor) -> Tensor:
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    difference = whole_scores(query, key) - whole_scores(query_t, key_t)
    return torch.where(pairs, difference, 0).square().sum()


def plain_kl(query: Tensor, key: Tensor, query_t: Tensor, key_t: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros((), dtype=query.dtype)
    for student, teacher, real in zip(whole_scores(query, key), whole_scores(query_t, key_t), mask.bool(), strict=True):
        # A sequence without its padding, as if that had never been there.
        log_s, log_t = [each[:, real][:, :, real].log_softmax(-1) for each in (student, teacher)]
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total


TERMS = {"mse": (score_mse, plain_mse), "kl": (attention_kl, plain_kl)}
terms = pytest.mark.parametrize("term", TERMS)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs[:2])


@terms
@pytest.mark.parametrize(("length", "head_size"), SIZES)
def test_value_and_gradients_are_those_of_whole_scores(
    term: str, length: int, head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = TERMS[term]
    # Several blocks, the last one not full.
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", 3 * HEADS * length)
    mask, inputs = padded(length), operands(length, head_size)
    value = ours(*inputs, mask, heads=HEADS)
    torch.testing.assert_close(value, plain(*inputs, mask))
    # A factor, as a loss has it: the gradient is scaled by what comes from above.
    found = gradients(lambda *each: 3 * ours(*each, mask, heads=HEADS), inputs)
    for one, expected in zip(found, gradients(lambda *each: 3 * plain(*each, mask), inputs), strict=True):
        torch.testing.assert_close(one, expected)
        assert (one[0, length - 2 :] == 0).all()
    torch.testing.assert_close(ours(*inputs, None, heads=HEADS), plain(*inputs, torch.ones_like(mask)))


@terms
def test_sequences_of_padding_alone_are_zero(term: str) -> None:
    ours, _ = TERMS[term]
    inputs, mask = operands(30, 4), torch.zeros(2, 30, dtype=torch.long)
    assert ours(*inputs, mask, heads=HEADS) == 0
    assert all((each == 0).all() for each in gradients(lambda *i: ours(*i, mask, heads=HEADS), inputs))


@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_small_differences_of_float32_are_not_lost(apart: float) -> None:
    """Squared, the scores differ by ``apart ** 2`` of their norm: below what float32 can tell from nothing at 1e-4."""
    inputs, exact = rounded(operands(128, 32, apart), torch.float32)
    mask = padded(128)
    value, expected = score_mse(*inputs, mask, heads=HEADS), plain_mse(*exact, mask)
    assert expected < 10 * apart**2 * whole_scores(*exact[:2]).square().sum()
    assert abs(value / expected - 1) < 2e-3
    found = gradients(lambda *each: score_mse(*each, mask, heads=HEADS), inputs)
    for one, right in zip(found, gradients(lambda *each: plain_mse(*each, mask), exact), strict=True):
        assert (one - right).norm() < 5e-3 * right.norm()


@terms
@pytest.mark.parametrize("length", [6, 30])
def test_sixteen_bit_operands_are_computed_in_float32(term: str, length: int) -> None:
    ours, plain = TERMS[term]
    inputs, exact = rounded(operands(length, 4), torch.bfloat16)
    mask = padded(length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(*inputs, mask, heads=HEADS)
        found = gradients(lambda *each: ours(*each, mask, heads=HEADS) / 100, inputs)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), plain(*exact, mask), rtol=1e-5, atol=0)
    for one, right in zip(found, gradients(lambda *each: plain(*each, mask) / 100, exact), strict=True):
        assert one.dtype is torch.bfloat16
        assert (one.double() - right).norm() < torch.finfo(torch.bfloat16).eps * right.norm()
