"""The terms of the distillation loss against means built in the plain way, and what does not fit told by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from kron_kernels.distill.hidden_states import Captured, capture
from kron_kernels.distill.losses import LossConfig, Normalizers, check_pair, distillation_losses
from kron_kernels.models import KronBertConfig, KronBertForSequenceClassification

LAYERS, HEADS, HIDDEN = 4, 2, 8
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
NAMES = ("embedding", "scores", "ffn", "logits", "supervised")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def states(mask: Tensor = MASK, dtype: torch.dtype = torch.float64) -> Captured:
    def one() -> Tensor:
        return torch.randn(*mask.shape, HIDDEN, dtype=dtype, requires_grad=True)

    queries, keys, ffn = (tuple(one() for _ in range(LAYERS)) for _ in range(3))
    return Captured(one(), queries, keys, ffn)


def only(**weights: Any) -> LossConfig:
    """A configuration of the given terms alone."""
    return LossConfig(**{**dict.fromkeys(NAMES, 0.0), **weights})


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    return scores_of(query, key).softmax(-1)


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    """``(heads, length, length)`` of one sequence."""
    query, key = (each.unflatten(1, (HEADS, -1)).transpose(0, 1) for each in (query, key))
    return query @ key.mT / query.shape[2] ** 0.5


def mean_over_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student[MASK.bool()], teacher[MASK.bool()])


def mean_over_pairs(student: Captured, teacher: Captured, layer: int) -> Tensor:
    differences = []
    for sequence, length in enumerate(MASK.sum(1).tolist()):
        mine, theirs = (
            scores_of(each.queries[layer][sequence, :length], each.keys[layer][sequence, :length])
            for each in (student, teacher)
        )
        differences.append((mine - theirs).flatten())
    return torch.cat(differences).square().mean()


def test_the_default_is_the_plain_sum_of_means_over_what_is_no_padding() -> None:
    student, teacher = states(), states()
    logits, logits_t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    supervised = torch.tensor(0.7, dtype=torch.float64)
    found = distillation_losses(
        LossConfig(), student, teacher, MASK, logits, logits_t, heads=HEADS, supervised=supervised
    )
    assert student.embedding is not None
    assert teacher.embedding is not None
    expected = {
        "embedding": mean_over_tokens(student.embedding, teacher.embedding),
        "scores": sum(mean_over_pairs(student, teacher, layer) for layer in range(LAYERS)),
        "ffn": sum(mean_over_tokens(*pair) for pair in zip(student.ffn, teacher.ffn, strict=True)),
        "logits": F.mse_loss(logits, logits_t),
        "supervised": supervised,
    }
    assert list(found) == [*NAMES, "loss"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
        assert not found[name].requires_grad
    torch.testing.assert_close(found["loss"], sum(expected.values()))
    every = [student.embedding, *student.queries, *student.keys, *student.ffn]
    gradients = [torch.autograd.grad(loss, every) for loss in (found["loss"], sum(expected.values()))]
    torch.testing.assert_close(*gradients)
    assert all((each[MASK == 0] == 0).all() for each in gradients[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_term_of_weight_zero_is_neither_computed_nor_captured(name: str) -> None:
    config = LossConfig(**{name: 0.0})
    student, teacher = (
        Captured(
            None if name == "embedding" else each.embedding,
            () if name == "scores" else each.queries,
            () if name == "scores" else each.keys,
            () if name == "ffn" else each.ffn,
        )
        for each in (states(), states())
    )
    logits = torch.ones(4, 3)
    found = distillation_losses(
        config, student, teacher, MASK, logits, logits, heads=HEADS, supervised=torch.tensor(1.0)
    )
    assert set(found) == {*NAMES, "loss"} - {name}
    options = config.capture_options()
    assert options == {"embedding": True, "scores": True, "ffn": True, "ffn_at": "layer", **options}
    assert all(options[term] == (term != name) for term in ("embedding", "scores", "ffn"))


def test_terms_without_a_teacher_are_left_out() -> None:
    student, logits = states(), torch.ones(4, 3)
    options: dict[str, Any] = {"heads": HEADS, "supervised": torch.tensor(1.0)}
    assert set(distillation_losses(LossConfig(), student, None, MASK, logits, **options)) == {"supervised", "loss"}
    found = distillation_losses(LossConfig(), student, states(), MASK, logits, None, heads=HEADS)
    assert set(found) == {"embedding", "scores", "ffn", "loss"}
    with pytest.raises(ValueError, match="config: expected a term with a weight above 0 that something was given for"):
        distillation_losses(LossConfig(), student, None, MASK, logits, heads=HEADS)


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_parts_of_a_batch_sum_to_the_whole_under_its_counts(form: str) -> None:
    """As processes and steps of accumulation share it: parts of unlike size, and logits rows of unlike number."""
    student, teacher = states(), states()
    logits, logits_t = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    row_mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    config = LossConfig(attention=form, logits_form=form, supervised=0.0)
    whole = distillation_losses(config, student, teacher, MASK, logits, logits_t, heads=HEADS, row_mask=row_mask)
    slices = [slice(0, 1), slice(1, 4)]
    counts = [Normalizers.of(MASK[part], row_mask[part]) for part in slices]
    total = Normalizers(*(sum(each) for each in zip(*counts, strict=True)))
    assert [int(each) for each in total] == [13, 51, 6]

    def part_of(captured: Captured, part: slice) -> Captured:
        assert captured.embedding is not None
        return Captured(captured.embedding[part], *(tuple(each[part] for each in several) for several in captured[1:]))

    parts = [
        distillation_losses(
            config,
            part_of(student, part),
            part_of(teacher, part),
            MASK[part],
            logits[part],
            logits_t[part],
            heads=HEADS,
            row_mask=row_mask[part],
            normalizers=total,
        )
        for part in slices
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(each[name] for each in parts), value)
    # Plain numbers do as well as tensors.
    numbers = Normalizers(13, 51.0, 6)
    again = distillation_losses(
        config, student, teacher, MASK, logits, logits_t, heads=HEADS, row_mask=row_mask, normalizers=numbers
    )
    torch.testing.assert_close(again, whole)


def test_kl_of_attention_is_a_mean_over_queries_and_heads() -> None:
    student, teacher = states(), states()
    found = distillation_losses(only(scores=1.0, attention="kl"), student, teacher, MASK, heads=HEADS)
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(LAYERS):
        for sequence, length in enumerate(MASK.sum(1).tolist()):
            mine, theirs = (
                probabilities(each.queries[layer][sequence, :length], each.keys[layer][sequence, :length])
                for each in (student, teacher)
            )
            total = total + (theirs * (theirs / mine).log()).sum()
    torch.testing.assert_close(found["loss"], total / (MASK.sum() * HEADS))


def test_kl_of_logits_with_a_temperature() -> None:
    logits = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    logits_t = torch.randn(4, 5, 3, dtype=torch.float64)
    row_mask = MASK.bool()
    config = only(logits=1.0, logits_form="kl", temperature=2.0)
    found = distillation_losses(config, Captured(None), None, MASK, logits, logits_t, heads=HEADS, row_mask=row_mask)[
        "loss"
    ]
    mine, theirs = ((each[row_mask] / 2).softmax(-1) for each in (logits, logits_t))
    expected = 4 * (theirs * (theirs / mine).log()).sum() / row_mask.sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_drawn_layers_are_reproducible_and_right_on_average() -> None:
    student, teacher = states(), states()
    every = distillation_losses(only(scores=1.0, ffn=1.0), student, teacher, MASK, heads=HEADS)
    config = only(scores=1.0, ffn=1.0, layers=1)

    def draw(seed: int, times: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            distillation_losses(config, student, teacher, MASK, heads=HEADS, generator=generator) for _ in range(times)
        ]

    some = draw(3, 20)
    torch.testing.assert_close(draw(3, 20), some)
    singles = {
        name: torch.stack(sorted({float(each[name]): each[name] for each in some}.values(), key=float))
        for name in ("scores", "ffn")
    }
    for name, values in singles.items():
        assert len(values) == LAYERS  # each layer came, and no two at once
        torch.testing.assert_close(values.mean(), every[name])
    # The same layer in both terms.
    assert len({(float(each["scores"]), float(each["ffn"])) for each in some}) == LAYERS
    both = distillation_losses(only(ffn=1.0, layers=LAYERS), student, teacher, MASK, heads=HEADS)
    torch.testing.assert_close(both["ffn"], every["ffn"])
    with pytest.raises(ValueError, match="layers: expected at most the 4 layers that were captured, got 5"):
        distillation_losses(only(ffn=1.0, layers=5), student, teacher, MASK, heads=HEADS)


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_a_batch_of_padding_alone_is_zero(form: str) -> None:
    student = states()
    nothing = torch.zeros_like(MASK)
    logits = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    config = LossConfig(attention=form, logits_form=form)
    found = distillation_losses(
        config, student, states(), nothing, logits, torch.randn(4, 5, 3), heads=HEADS, row_mask=nothing
    )
    assert found["loss"] == 0
    found["loss"].backward()
    assert student.ffn[0].grad is not None
    assert (student.ffn[0].grad == 0).all()


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_sixteen_bits_and_autocast_give_float32(form: str) -> None:
    student, teacher = states(dtype=torch.bfloat16), states(dtype=torch.bfloat16)
    logits, logits_t = torch.randn(4, 3).bfloat16().requires_grad_(), torch.randn(4, 3).bfloat16()
    config = LossConfig(attention=form, logits_form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_losses(config, student, teacher, MASK, logits, logits_t, heads=HEADS)
    found["loss"].backward()
    assert logits.grad is not None
    exact = [
        Captured(each.embedding.double(), *(tuple(one.double() for one in several) for several in each[1:]))  # type: ignore[union-attr]
        for each in (student, teacher)
    ]
    expected = distillation_losses(config, *exact, MASK, logits.double(), logits_t.double(), heads=HEADS)
    for name, value in found.items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_step_through_models_brings_the_student_nearer() -> None:
    """Capture and terms together: the loss falls, the teacher gets no gradient."""
    ids = torch.randint(1, 50, (4, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    teacher = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()
    student = KronBertForSequenceClassification(KronBertConfig(**SIZES, num_labels=3)).train()
    check_pair(teacher, student)
    config = LossConfig(supervised=0.0)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    losses = []
    with capture(teacher, **config.capture_options()) as theirs, capture(student, **config.capture_options()) as mine:
        for _ in range(8):
            with torch.no_grad():
                logits_t = teacher(ids, attention_mask=mask).logits
            logits = student(ids, attention_mask=mask).logits
            found = distillation_losses(config, mine.take(), theirs.take(), mask, logits, logits_t, heads=4)
            optimizer.zero_grad()
            found["loss"].backward()
            assert all(each.grad is not None for each in student.bert.encoder.parameters())
            optimizer.step()
            losses.append(found["loss"].item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": -1.0}, r"embedding: expected a weight of at least 0, got -1\.0"),
        ({"supervised": float("nan")}, "supervised: expected a weight of at least 0, got nan"),
        (dict.fromkeys(NAMES, 0.0), "embedding, scores, ffn, logits, supervised: expected a weight above 0 among them"),
        ({"attention": "cosine"}, "attention: expected 'mse' or 'kl', got 'cosine'"),
        ({"logits_form": "ce"}, "logits_form: expected 'mse' or 'kl', got 'ce'"),
        ({"ffn_at": "output"}, "ffn_at: expected 'layer' or 'dense', got 'output'"),
        ({"temperature": 0.0}, r"temperature: expected a number above 0, got 0\.0"),
        ({"layers": 0}, "layers: expected a number of at least 1 or None, got 0"),
    ],
)
def test_configurations_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


def test_what_does_not_fit_is_named() -> None:
    student, teacher, logits = states(), states(), torch.ones(4, 5, 3)
    assert student.embedding is not None

    def refuse(message: str, config: LossConfig, mine: Captured, theirs: Captured | None, **options: Any) -> None:
        given = {"student_logits": logits, "teacher_logits": logits, "heads": HEADS, **options}
        with pytest.raises(ValueError, match=message):
            distillation_losses(config, mine, theirs, MASK, **given)

    bare = Captured(None)
    needs = "expected what its weight above 0 needs, got nothing captured"
    refuse(f"student.embedding: {needs}", LossConfig(), bare, teacher)
    refuse(f"teacher.keys: {needs}", only(scores=1.0), student, teacher._replace(keys=()))
    refuse(f"student.ffn: {needs}", only(ffn=1.0), bare, teacher)
    refuse(
        "teacher.ffn: expected as many layers as the student, 4, got 3",
        LossConfig(),
        student,
        teacher._replace(ffn=teacher.ffn[1:]),
    )
    wider = teacher._replace(embedding=torch.ones(4, 5, 9))
    refuse(
        r"teacher.embedding: expected the student's shape, \(4, 5, 8\), got \(4, 5, 9\)", LossConfig(), student, wider
    )
    refuse(
        r"teacher_logits: expected the shape of student_logits, \(4, 5, 3\), got \(4, 3\)",
        LossConfig(),
        student,
        teacher,
        teacher_logits=torch.ones(4, 3),
    )
    refuse(
        r"row_mask: expected the shape of the rows of logits, \(4, 5\), got \(4,\)",
        LossConfig(),
        student,
        teacher,
        row_mask=torch.ones(4),
    )
    one = torch.ones(4, 1)
    refuse(
        "logits_form: expected 'mse' for logits of one class",
        LossConfig(logits_form="kl"),
        student,
        teacher,
        student_logits=one,
        teacher_logits=one,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "student: expected the teacher's layers, 2, got 3"),
        ({"hidden_size": 96}, "student: expected the teacher's hidden size, 48, got 96"),
        ({"num_attention_heads": 6}, "student: expected the teacher's attention heads, 4, got 6"),
        ({"vocab_size": 51}, "student: expected the teacher's vocabulary, 50, got 51"),
        ({"max_position_embeddings": 16}, "student: expected at least the teacher's 20 positions, got 16"),
        ({"num_labels": 3}, "student: expected the teacher's labels, 2, got 3"),
    ],
)
def test_pairs_that_cannot_be_compared(change: dict[str, int], message: str) -> None:
    teacher = BertForSequenceClassification(BertConfig(**SIZES))
    student = KronBertForSequenceClassification(KronBertConfig(**{**SIZES, **change}))
    with pytest.raises(ValueError, match=message):
        check_pair(nn.ModuleList([teacher]), student)
