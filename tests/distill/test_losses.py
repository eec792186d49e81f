"""The terms of the distillation loss against means built in the plain way, and what does not fit told by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from kron_kernels.distill.hidden_states import Captured
from kron_kernels.distill.losses import LossConfig, Normalizers, check_pair, distillation_losses
from kron_kernels.models import KronBertConfig, KronBertForSequenceClassification

LAYERS, HEADS, HIDDEN = 4, 2, 8
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
NAMES = ("embedding", "scores", "ffn", "logits", "supervised")


def states() -> Captured:
    def one() -> Tensor:
        return torch.randn(*MASK.shape, HIDDEN, dtype=torch.float64, requires_grad=True)

    queries, keys, ffn = (tuple(one() for _ in range(LAYERS)) for _ in range(3))
    return Captured(one(), queries, keys, ffn)


def only(**weights: Any) -> LossConfig:
    """A configuration of the given terms alone."""
    return LossConfig(**{**dict.fromkeys(NAMES, 0.0), **weights})


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """``(heads, length, length)`` of one sequence."""
    query, key = (each.unflatten(1, (HEADS, -1)).transpose(0, 1) for each in (query, key))
    return query @ key.mT / query.shape[2] ** 0.5


def mean_over_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student[MASK.bool()], teacher[MASK.bool()])


def attention_of_layer(student: Captured, teacher: Captured, layer: int, form: str) -> Tensor:
    """Mean over pairs and heads of the squared error, or over queries and heads of KL."""
    found = []
    for sequence, length in enumerate(MASK.sum(1).tolist()):
        mine, theirs = (
            scores_of(each.queries[layer][sequence, :length], each.keys[layer][sequence, :length])
            for each in (student, teacher)
        )
        if form == "mse":
            found.append((mine - theirs).square().flatten())
        else:
            found.append((theirs.softmax(-1) * (theirs.log_softmax(-1) - mine.log_softmax(-1))).sum(-1).flatten())
    return torch.cat(found).mean()


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_each_term_is_a_mean_over_what_is_not_padding(form: str) -> None:
    student, teacher = states(), states()
    logits, logits_t = torch.randn(4, 3, dtype=torch.float64).requires_grad_(), torch.randn(4, 3, dtype=torch.float64)
    supervised = torch.tensor(0.7, dtype=torch.float64)
    config = LossConfig(attention=form, logits_form=form, temperature=2.0)
    found = distillation_losses(config, student, teacher, MASK, logits, logits_t, heads=HEADS, supervised=supervised)
    mine, theirs = (logits / 2).softmax(-1), (logits_t / 2).softmax(-1)
    kl = 4 * (theirs * (theirs / mine).log()).sum(-1).mean()
    expected = {
        "embedding": mean_over_tokens(student.embedding, teacher.embedding),
        "scores": sum(attention_of_layer(student, teacher, layer, form) for layer in range(LAYERS)),
        "ffn": sum(mean_over_tokens(*pair) for pair in zip(student.ffn, teacher.ffn, strict=True)),
        "logits": F.mse_loss(logits, logits_t) if form == "mse" else kl,
        "supervised": supervised,
    }
    assert list(found) == [*NAMES, "loss"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    torch.testing.assert_close(found["loss"], sum(expected.values()))
    every = [logits, student.embedding, *student.queries, *student.keys, *student.ffn]
    gradients = [torch.autograd.grad(loss, every) for loss in (found["loss"], sum(expected.values()))]
    torch.testing.assert_close(*gradients)
    assert all((each[MASK == 0] == 0).all() for each in gradients[0][1:])


def test_a_term_of_weight_zero_needs_nothing_captured() -> None:
    student, config = states()._replace(queries=(), keys=()), LossConfig(scores=0.0)
    assert config.capture_options()["scores"] is False
    assert set(distillation_losses(config, student, states(), MASK, heads=HEADS)) == {"embedding", "ffn", "loss"}


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_parts_of_a_batch_sum_to_the_whole_under_its_counts(form: str) -> None:
    """As processes and steps of accumulation share it: parts of unlike size, and logits rows of unlike number."""
    student, teacher = states(), states()
    logits, logits_t = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    row_mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    config = LossConfig(attention=form, logits_form=form, supervised=0.0)

    def losses(part: slice, normalizers: Normalizers | None) -> dict[str, Tensor]:
        mine, theirs = (
            Captured(each.embedding[part], *(tuple(one[part] for one in several) for several in each[1:]))
            for each in (student, teacher)
        )
        options: dict[str, Any] = {"heads": HEADS, "row_mask": row_mask[part], "normalizers": normalizers}
        return distillation_losses(config, mine, theirs, MASK[part], logits[part], logits_t[part], **options)

    slices = [slice(0, 1), slice(1, 4)]
    counts = [Normalizers.of(MASK[part], row_mask[part]) for part in slices]
    total = Normalizers(*(sum(each) for each in zip(*counts, strict=True)))
    assert [int(each) for each in total] == [13, 51, 6]
    parts = [losses(part, total) for part in slices]
    for name, value in losses(slice(0, 4), None).items():
        torch.testing.assert_close(sum(each[name] for each in parts), value)


def test_drawn_layers_are_reproducible_and_right_on_average() -> None:
    student, teacher = states(), states()
    every = distillation_losses(only(scores=1.0, ffn=1.0), student, teacher, MASK, heads=HEADS)
    config = only(scores=1.0, ffn=1.0, layers=1)

    def draw() -> list[tuple[float, float]]:
        generator = torch.Generator().manual_seed(3)
        options: dict[str, Any] = {"heads": HEADS, "generator": generator}
        found = [distillation_losses(config, student, teacher, MASK, **options) for _ in range(20)]
        return [(float(each["scores"]), float(each["ffn"])) for each in found]

    singles = set(draw())
    assert draw() == draw()
    assert len(singles) == LAYERS  # each layer came, the same one in both terms
    for values, name in zip(zip(*singles, strict=True), ("scores", "ffn"), strict=True):
        assert sum(values) / LAYERS == pytest.approx(float(every[name]))


def test_what_does_not_fit_is_named() -> None:
    student, teacher, logits = states(), states(), torch.ones(4, 5, 3)
    fewer = teacher._replace(ffn=teacher.ffn[1:])
    for theirs, options, message in [
        (teacher._replace(keys=()), {}, "teacher.keys: expected what its weight above 0 needs, got nothing captured"),
        (fewer, {}, "teacher.ffn: expected as many layers as the student, 4, got 3"),
        (teacher, {"teacher_logits": logits[0]}, "teacher_logits: expected the shape of student_logits"),
    ]:
        given: dict[str, Any] = {"student_logits": logits, "teacher_logits": logits, "heads": HEADS, **options}
        with pytest.raises(ValueError, match=message):
            distillation_losses(LossConfig(), student, theirs, MASK, **given)
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    bert = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=2))
    other = KronBertForSequenceClassification(KronBertConfig(**sizes, num_hidden_layers=1))
    with pytest.raises(ValueError, match="student: expected the teacher's layers, 2, got 1"):
        check_pair(bert, other)
