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
SIZES = ((5, 8), (12, 4), (13, 4), (40, 4))


def operands(length: int, head_size: int, batch: int = 2, apart: float = 1.0) -> list[Tensor]:
    """Student's query and key, then the teacher's, in float64; ``apart`` is how far the teacher's are off."""
    shape = (batch, length, HEADS * head_size)
    query, key = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    far = [each + apart * torch.randn_like(each) for each in (query, key)]
    return [query.requires_grad_(), key.requires_grad_(), *far]


def padded(length: int, batch: int = 2) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
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
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients_are_those_of_whole_scores(
    term: str, length: int, head_size: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = TERMS[term]
    # Several blocks, the last one not full.
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", 3 * HEADS * length)
    mask = padded(length)
    if not masked:
        mask = torch.ones_like(mask)
    inputs = operands(length, head_size)
    given = mask if masked else None
    value = ours(*inputs, given, heads=HEADS)
    torch.testing.assert_close(value, plain(*inputs, mask))
    assert value.dtype is torch.float64
    # A factor, as a loss has it: the gradient is scaled by what comes from above.
    found = gradients(lambda *each: 3 * ours(*each, given, heads=HEADS), inputs)
    for one, expected in zip(found, gradients(lambda *each: 3 * plain(*each, mask), inputs), strict=True):
        torch.testing.assert_close(one, expected)
        assert masked == bool((one[0, length - 2 :] == 0).all())


@terms
@pytest.mark.parametrize(("length", "head_size"), [(5, 3), (10, 3)])
def test_gradcheck(term: str, length: int, head_size: int) -> None:
    ours, _ = TERMS[term]
    inputs = operands(length, head_size)
    assert torch.autograd.gradcheck(lambda *each: ours(*each, *inputs[2:], padded(length), heads=HEADS), inputs[:2])


@terms
@pytest.mark.parametrize("length", [6, 30])
def test_garbage_at_padding_changes_nothing(term: str, length: int) -> None:
    ours, _ = TERMS[term]
    inputs, mask = operands(length, 4), padded(length)
    clean = ours(*inputs, mask, heads=HEADS)
    with torch.no_grad():
        for value, each in zip((float("nan"), float("inf"), float("nan"), 1e30), inputs, strict=True):
            each[mask == 0] = value
    assert torch.equal(ours(*inputs, mask, heads=HEADS), clean)
    assert all(each.isfinite().all() for each in gradients(lambda *i: ours(*i, mask, heads=HEADS), inputs))


@terms
@pytest.mark.parametrize("length", [6, 30])
def test_sequences_of_padding_alone_and_empty_batches_are_zero(term: str, length: int) -> None:
    ours, _ = TERMS[term]
    inputs = operands(length, 4)
    mask = torch.zeros(2, length, dtype=torch.long)
    assert ours(*inputs, mask, heads=HEADS) == 0
    assert all((each == 0).all() for each in gradients(lambda *i: ours(*i, mask, heads=HEADS), inputs))
    for batch, tokens in ((0, length), (2, 0)):
        inputs = operands(tokens, 4, batch=batch)
        value = ours(*inputs, torch.ones(batch, tokens), heads=HEADS)
        assert value == 0
        assert [each.shape for each in torch.autograd.grad(value, inputs[:2])] == [inputs[0].shape] * 2


@pytest.mark.parametrize(("length", "head_size"), [(32, 32), (128, 32)])
@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4])
def test_small_differences_of_float32_are_not_lost(length: int, head_size: int, apart: float) -> None:
    """Squared, the scores differ by ``apart ** 2`` of their norm: below what float32 can tell from nothing at 1e-4."""
    inputs = [
        each.detach().float().requires_grad_(each.requires_grad) for each in operands(length, head_size, 2, apart)
    ]
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]
    mask = padded(length)
    value, expected = score_mse(*inputs, mask, heads=HEADS), plain_mse(*exact, mask)
    assert expected < 10 * apart**2 * whole_scores(*exact[:2]).square().sum()
    assert abs(value / expected - 1) < 2e-3
    found = gradients(lambda *each: score_mse(*each, mask, heads=HEADS), inputs)
    for one, right in zip(found, gradients(lambda *each: plain_mse(*each, mask), exact), strict=True):
        assert (one - right).norm() < 5e-3 * right.norm()


@terms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [6, 30])
def test_sixteen_bit_operands_are_computed_in_float32(term: str, dtype: torch.dtype, length: int) -> None:
    ours, plain = TERMS[term]
    inputs = [each.detach().to(dtype).requires_grad_(each.requires_grad) for each in operands(length, 4)]
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]
    mask = padded(length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(*inputs, mask, heads=HEADS)
        found = gradients(lambda *each: ours(*each, mask, heads=HEADS) / 100, inputs)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), plain(*exact, mask), rtol=1e-5, atol=0)
    for one, right in zip(found, gradients(lambda *each: plain(*each, mask) / 100, exact), strict=True):
        assert one.dtype is dtype
        assert (one.double() - right).norm() < torch.finfo(dtype).eps * right.norm()


@terms
def test_the_teacher_may_have_another_dtype_and_gets_no_gradient(term: str) -> None:
    ours, plain = TERMS[term]
    query, key, *teacher = [each.detach() for each in operands(6, 4)]
    student = [query.float().requires_grad_(), key.float().requires_grad_()]
    teacher = [each.bfloat16().requires_grad_() for each in teacher]
    value = ours(*student, *teacher, None, heads=HEADS)
    value.backward()
    assert all(each.grad is None for each in teacher)
    assert all(each.grad is not None for each in student)
    exact = [each.detach().double() for each in (*student, *teacher)]
    torch.testing.assert_close(value.double(), plain(*exact, torch.ones(2, 6)), rtol=1e-5, atol=0)


@terms
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (2, 12)}, r"student_query: expected shape \(batch, length, heads \* head_size\), got \(2, 12\)"),
        ({1: (2, 6, 9)}, r"student_key: expected the shape of student_query, \(2, 6, 12\), got \(2, 6, 9\)"),
        ({2: (2, 5, 12)}, r"teacher_query: expected the shape of student_query, \(2, 6, 12\), got \(2, 5, 12\)"),
        ({3: (1, 6, 12)}, r"teacher_key: expected the shape of student_query, \(2, 6, 12\), got \(1, 6, 12\)"),
        ({4: (2, 5)}, r"mask: expected shape \(batch, length\) = \(2, 6\), got \(2, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(term: str, change: dict[int, tuple[int, ...]], message: str) -> None:
    shapes = [(2, 6, 12)] * 4 + [(2, 6)]
    given = [torch.ones(change.get(index, shape)) for index, shape in enumerate(shapes)]
    with pytest.raises(ValueError, match=message):
        TERMS[term][0](*given, heads=HEADS)
