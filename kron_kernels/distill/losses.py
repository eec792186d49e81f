"""The terms of KroneckerBERT's distillation and their weighted sum (Tahaei et al., 2021, section 3.2 and eq. 14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hidden_states import FFN_PLACES, Captured, encoder_of
from .scores import attention_kl, score_mse

TERMS = ("embedding", "scores", "ffn", "logits", "supervised")
_FORMS = {"attention": ("mse", "kl"), "logits_form": ("mse", "kl"), "ffn_at": FFN_PLACES}
# What must be the same in both models for their layers to be compared one to one.
_SAME = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "attention heads",
    "vocab_size": "vocabulary",
}


@dataclass(frozen=True)
class LossConfig:
    """Which terms a distillation sums, with which weights and in which form. The defaults are the paper's plain sum.

    Args:
        embedding: weight of the mean squared error of the embeddings' outputs.
        scores: weight of the attention term, summed over layers.
        ffn: weight of the mean squared error of the feed-forward outputs, summed over layers.
        logits: weight of the term on the logits.
        supervised: weight of the loss that the labels give. A term of weight 0 is not computed.
        attention: "mse" of the scores before the softmax (KroneckerBERT, TinyBERT) or "kl" of the probabilities
            (KnGPT2).
        logits_form: "mse" or "kl". The paper does not give the form. MSE is the default because it serves regression
            too, where a softmax over one value says nothing, and has no temperature to choose; Kim et al., "Comparing
            Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation" (2021), find it no worse.
        temperature: of "kl" on logits, which is multiplied by its square (Hinton et al., 2015).
        ffn_at: where the feed-forward output is taken: see ``capture``.
        layers: how many layers, drawn at random at each step, the scores and ffn terms compare (RAIL-KD, Haidar et
            al., 2022), or None for all. Their sum is scaled by ``num_hidden_layers / layers``: on average it is that
            of all layers.

    Raises:
        ValueError: a weight that is negative or not finite, all of them 0, a form there is not, a temperature or
            number of layers that is not positive.
    """

    embedding: float = 1.0
    scores: float = 1.0
    ffn: float = 1.0
    logits: float = 1.0
    supervised: float = 1.0
    attention: str = "mse"
    logits_form: str = "mse"
    temperature: float = 1.0
    ffn_at: str = "layer"
    layers: int | None = None

    def __post_init__(self) -> None:
        for name in TERMS:
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}: expected a weight of at least 0, got {weight!r}")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError(f"{', '.join(TERMS)}: expected a weight above 0 among them, got none")
        for name, forms in _FORMS.items():
            if getattr(self, name) not in forms:
                choices = " or ".join(repr(form) for form in forms)
                raise ValueError(f"{name}: expected {choices}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers: expected a number of at least 1 or None, got {self.layers!r}")

    def capture_options(self) -> dict[str, Any]:
        """The keyword arguments with which ``capture`` keeps what these terms need, and no more."""
        return {"embedding": self.embedding > 0, "scores": self.scores > 0, "ffn": self.ffn > 0, "ffn_at": self.ffn_at}


class Normalizers(NamedTuple):
    """The counts that the sums of a batch are divided by, as numbers or scalar tensors.

    Where a batch is spread over processes and steps of accumulation, each takes the counts of the whole: then the
    parts' losses sum to the loss of the batch.
    """

    tokens: Tensor | float  # that are no padding
    pairs: Tensor | float  # of a query and a key of the same sequence, none of them padding
    rows: Tensor | float  # of logits

    @classmethod
    def of(cls, mask: Tensor, row_mask: Tensor | None = None) -> Normalizers:
        """Counts of a batch: ``mask (batch, length)``; ``row_mask`` as in :func:`distillation_losses`.

        Without ``row_mask``, there is a row for each sequence. Add up the fields of several batches for the whole.
        """
        lengths = mask.bool().sum(1)
        rows = torch.tensor(mask.shape[0], device=mask.device) if row_mask is None else row_mask.bool().sum()
        return cls(lengths.sum(), lengths.square().sum(), rows)


def distillation_losses(
    config: LossConfig,
    student: Captured,
    teacher: Captured | None,
    mask: Tensor,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    *,
    heads: int,
    row_mask: Tensor | None = None,
    supervised: Tensor | None = None,
    normalizers: Normalizers | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Each term of the distillation, and their weighted sum.

    embedding, ffn: squared error, mean over tokens and hidden size. scores: squared error, mean over pairs and heads,
    or KL, mean over queries and heads. Both of the latter are summed over layers. logits: mean over rows and classes of
    the squared error, or mean over rows of KL. Padding takes no part in any.

    Args:
        config: weights and forms.
        student: what ``capture`` took of the student's forward, for all that ``config`` weighs above 0.
        teacher: the same of the teacher's forward on the same batch, or None for no term of inner layers.
        mask: ``(batch, length)``, 0 at padding.
        student_logits, teacher_logits: ``(..., classes)``; without one of them, the term is left out.
        heads: attention heads of both models.
        row_mask: which rows of the logits count, of their shape without the last dimension; None for all.
        supervised: the loss on the labels, a scalar that is divided already by what it averages over. It is taken as
            it is; None leaves the term out.
        normalizers: counts of the whole batch that this one is a part of; None for those of this batch.
        generator: draws the layers where ``config.layers`` says to draw; torch's own if None. Processes that share
            a batch must have generators of the same state.

    Returns:
        Name to scalar: the terms that were computed, unweighted and detached, and "loss", their weighted sum with its
        graph. float32, or float64 where the student is.

    Raises:
        ValueError: shapes or numbers of layers that do not match; something that was not captured; KL of logits with
            one class; no term at all.
    """
    counts = normalizers or _counts(mask, student_logits, row_mask)
    terms: dict[str, Tensor] = {}
    if teacher is not None:
        terms.update(_layer_terms(config, student, teacher, mask, heads, counts, generator))
    if config.logits and student_logits is not None and teacher_logits is not None:
        terms["logits"] = _logits_term(config, student_logits, teacher_logits, row_mask) / _at_least_one(counts.rows)
    if config.supervised and supervised is not None:
        terms["supervised"] = supervised
    if not terms:
        raise ValueError("config: expected a term with a weight above 0 that something was given for, got none")
    loss = sum((getattr(config, name) * term for name, term in terms.items()), start=torch.zeros(()).to(mask.device))
    return {**{name: term.detach() for name, term in terms.items()}, "loss": loss}


def check_pair(teacher: nn.Module, student: nn.Module) -> None:
    """Raise ValueError where two BERTs cannot be compared layer by layer; TypeError for other models.

    Layers, hidden size, heads and vocabulary must be the same, and the student's position table as long as the
    teacher's at least. So must the number of labels, where both classify.
    """
    expected, got = encoder_of(teacher).config, encoder_of(student).config
    for field, name in _SAME.items():
        _compare(name, getattr(expected, field), getattr(got, field))
    positions = expected.max_position_embeddings, got.max_position_embeddings
    if positions[1] < positions[0]:
        raise ValueError(f"student: expected at least the teacher's {positions[0]} positions, got {positions[1]}")
    labels = [_labels(teacher), _labels(student)]
    if None not in labels:
        _compare("labels", *labels)


def _compare(name: str, expected: Any, got: Any) -> None:
    if got != expected:
        raise ValueError(f"student: expected the teacher's {name}, {expected}, got {got}")


def _labels(model: nn.Module) -> int | None:
    """Of the head that has labels, whatever is around it."""
    return next((vars(module)["num_labels"] for module in model.modules() if "num_labels" in vars(module)), None)


def _counts(mask: Tensor, logits: Tensor | None, row_mask: Tensor | None) -> Normalizers:
    counts = Normalizers.of(mask, row_mask)
    return counts if row_mask is not None or logits is None else counts._replace(rows=logits.shape[:-1].numel())


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


def _layer_terms(
    config: LossConfig,
    student: Captured,
    teacher: Captured,
    mask: Tensor,
    heads: int,
    counts: Normalizers,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    tokens = _at_least_one(counts.tokens)
    padding_at = None if bool(mask.all()) else mask
    real = None if padding_at is None else mask.flatten().nonzero().squeeze(1)
    terms: dict[str, Tensor] = {}
    if config.embedding:
        (pair,) = _pairs("embedding", [student.embedding], [teacher.embedding])
        terms["embedding"] = _squared_error(*pair, real) / (tokens * pair[0].shape[2])
    if not (config.scores or config.ffn):
        return terms
    chosen, scale = _chosen_layers(config, len(student.queries if config.scores else student.ffn), generator)
    if config.scores:
        queries = _pairs("queries", student.queries, teacher.queries)
        keys = _pairs("keys", student.keys, teacher.keys)
        term = score_mse if config.attention == "mse" else attention_kl
        each = [term(queries[i][0], keys[i][0], queries[i][1], keys[i][1], padding_at, heads=heads) for i in chosen]
        over = counts.pairs if config.attention == "mse" else counts.tokens
        terms["scores"] = torch.stack(each).sum() * scale / (_at_least_one(over) * heads)
    if config.ffn:
        outputs = _pairs("ffn", student.ffn, teacher.ffn)
        each = [_squared_error(*outputs[i], real) for i in chosen]
        terms["ffn"] = torch.stack(each).sum() * scale / (tokens * outputs[0][0].shape[2])
    return terms


def _chosen_layers(config: LossConfig, count: int, generator: torch.Generator | None) -> tuple[list[int], float]:
    """Which layers to compare, and what their sum is multiplied by."""
    if config.layers is None:
        return list(range(count)), 1.0
    if config.layers > count:
        raise ValueError(f"layers: expected at most the {count} layers that were captured, got {config.layers}")
    drawn = torch.randperm(count, generator=generator)[: config.layers]
    return sorted(drawn.tolist()), count / config.layers


def _pairs(
    name: str, student: Sequence[Tensor | None], teacher: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """What is compared, layer by layer, student first."""
    for whose, captured in (("student", student), ("teacher", teacher)):
        if not captured or captured[0] is None:
            raise ValueError(f"{whose}.{name}: expected what its weight above 0 needs, got nothing captured")
    if len(student) != len(teacher):
        raise ValueError(f"teacher.{name}: expected as many layers as the student, {len(student)}, got {len(teacher)}")
    pairs: Any = list(zip(student, teacher, strict=True))
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(
                f"teacher.{name}: expected the student's shape, {tuple(ours.shape)}, got {tuple(theirs.shape)}"
            )
    return pairs


def _squared_error(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """Sum over the tokens at ``real`` in the grid read row by row, or over all."""
    ours, theirs = (each.flatten(0, 1) for each in _wide(student, teacher))
    if real is not None:
        ours, theirs = ours.index_select(0, real), theirs.index_select(0, real)
    return F.mse_loss(ours, theirs, reduction="sum")


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that losses are computed in, the teacher's without a graph."""
    dtype = torch.float64 if student.dtype is torch.float64 else torch.float32
    return student.to(dtype), teacher.detach().to(dtype)


def _logits_term(config: LossConfig, student: Tensor, teacher: Tensor, row_mask: Tensor | None) -> Tensor:
    """Sum over rows."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits, {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    classes = student.shape[-1]
    if row_mask is not None:
        if row_mask.shape != student.shape[:-1]:
            raise ValueError(
                f"row_mask: expected the shape of the rows of logits, {tuple(student.shape[:-1])}, "
                f"got {tuple(row_mask.shape)}"
            )
        rows = row_mask.bool()
        student, teacher = student[rows], teacher[rows]
    ours, theirs = _wide(student, teacher)
    if config.logits_form == "mse":
        return F.mse_loss(ours, theirs, reduction="sum") / classes
    if classes == 1:
        raise ValueError("logits_form: expected 'mse' for logits of one class, got 'kl', which is 0 for them")
    log_s, log_t = (F.log_softmax(each / config.temperature, -1) for each in (ours, theirs))
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) * config.temperature**2
