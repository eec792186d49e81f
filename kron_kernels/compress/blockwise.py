"""Block-wise training: each block of a compressed BERT learns to give what the dense one's gives, from the bottom up.

A block is the embeddings or one transformer layer. Its input is what the compressed model itself computes below it, its
target what the dense block gives on the dense model's own states, so each block also makes up for the errors below it;
and the block below trains along once more, so that what it keeps is what this one needs. All parameters of both train,
LayerNorms and biases included; the norm at a block's end keeps the outputs' scale, which a least-squares fit of the
products alone on inputs with errors would shrink. The backward pass goes through two blocks, however deep the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.masking_utils import create_bidirectional_mask

from ..convert.calibrate import Progress, evaluating
from ..convert.layers import FACTORED
from ..nn import is_quantized

Batch = Mapping[str, Tensor]

SEQUENCES = 16
LEARNING_RATE = 3e-3
# For the embeddings by themselves: rows of a table see few tokens a step.
EMBEDDING_LEARNING_RATE = 1e-2
# How much the error of the block below counts while it trains along, both relative. More costs agreement of the last
# hidden states, less lets the states in between drift off.
_BELOW = 0.2
_BETAS = (0.9, 0.99)
_WARM_UP = 0.05  # of the steps


@dataclass(frozen=True)
class BlockReport:
    """One block: the error of its output before its training and at the end, on the text it was trained on.

    Root mean square of (output - dense output) over all tokens but padding, relative to that of the dense output's
    deviation from its mean. The block's input is the compressed model's own, the blocks below as trained by then.
    """

    name: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class WarmStartReport:
    """The blocks in their order, the steps each was trained for, and the tokens of the text."""

    blocks: tuple[BlockReport, ...]
    steps: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


@dataclass
class _States:
    """What one model has computed on some sequences: token ids (B, L) at first, hidden states (B, L, d) later."""

    values: Tensor
    types: Tensor | None  # token_type_ids (B, L)
    mask: Tensor | None  # what the layers take for attention

    def through(self, block: nn.Module) -> Tensor:
        if self.values.is_floating_point():
            return block(self.values, self.mask)
        return block(input_ids=self.values, token_type_ids=self.types)


@dataclass
class _Text:
    """Up to ``SEQUENCES`` sequences, and what the models compute on them where the training has got to."""

    tokens: Tensor  # (B, L) bool: False for padding
    own: _States  # the compressed model's, into the lowest block in training
    dense: _States  # the dense model's, out of the highest
    below: Tensor | None = None  # the dense model's out of the block below that, (B, L, d)


def warm_start(
    dense: nn.Module,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> WarmStartReport:
    """Train ``model``, block by block and in place, to reproduce the hidden states of ``dense`` on sample text.

    ``dense`` is transformers' BertModel or one with a head, ``model`` a KronBert (or a fused BERT) made from it. Each
    batch holds ``input_ids`` (B, L) and, where it has them, ``attention_mask`` (B, L) and ``token_type_ids`` (B, L);
    anything else in it is passed over. Sequences of like length in a batch save work. The embeddings, and then each
    layer together with the block below it, take ``steps`` steps of Adam on up to 16 sequences each, with a short
    warm-up and a cosine decay; zero steps change nothing. No labels are used, and poolers and heads stay as they are.

    The result depends on ``seed`` alone; the global random state is left alone, as are ``dense``, its training mode and
    ``model``'s, gradients and ``requires_grad``. Half-precision models are trained in float32 and rounded at the end.
    Needs memory for four copies of the text's hidden states, (tokens, d) each. ``progress(done, total, what)`` is
    called after every step.

    Raises ValueError for steps below 0, models that are no encoders of one architecture and size, stored integers, a
    model without Kronecker layers, no batches or batches without tokens; RuntimeError where the training diverges.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps: expected an int of at least 0, got {steps!r}")
    teacher, student = _encoder("dense", dense), _encoder("model", model)
    _check_pair(teacher, student)
    generator = torch.Generator().manual_seed(seed)
    blocks = [("embeddings", teacher.embeddings, student.embeddings)]
    layers = zip(teacher.encoder.layer, student.encoder.layer, strict=True)
    blocks += [(f"encoder.layer.{index}", *pair) for index, pair in enumerate(layers)]
    reports: list[BlockReport] = []
    lower: nn.Module | None = None
    with evaluating(teacher), evaluating(student), _trainable(student):
        texts = _texts(teacher, student, batches)
        for done, (name, wanted, block) in enumerate(blocks):

            def report(step: int, done: int = done, name: str = name) -> None:
                if progress is not None:
                    progress(done * steps + step, len(blocks) * steps, f"warm start: {name}")

            if lower is not None:
                for text in texts:
                    text.below = text.dense.values
            _advance([text.dense for text in texts], wanted)
            pair = [block] if lower is None else [lower, block]
            before = _error(texts, pair)
            rate = EMBEDDING_LEARNING_RATE if lower is None else LEARNING_RATE
            _train(pair, texts, steps, rate, generator, report)
            after = _error(texts, pair)
            if not math.isfinite(after):
                raise RuntimeError(f"warm start: the outputs of {name} are not finite at learning rate {rate:g}")
            if lower is not None:
                _advance([text.own for text in texts], lower)
                # It has trained along since.
                reports[-1] = replace(reports[-1], error_after=_error(texts, []))
            reports.append(BlockReport(name, before, after))
            lower = block
    return WarmStartReport(tuple(reports), steps, sum(int(text.tokens.sum()) for text in texts))


def _train(
    blocks: list[nn.Module],
    texts: list[_Text],
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> None:
    """Run Adam on the mean squared errors of the blocks' outputs at real tokens, relative to the dense ones' spread."""
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    optimizer = torch.optim.Adam(parameters, learning_rate, _BETAS)
    warm_up = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / max(1, steps))) / 2
    )
    spread = _spread(texts, [text.dense.values for text in texts])
    spread_below = _spread(texts, [text.below for text in texts]) if len(blocks) > 1 else 1.0
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(len(texts), generator=generator).tolist()
        text = texts[order.pop()]
        states, below = text.own, text.below
        loss: Any = 0.0
        if len(blocks) > 1 and below is not None:
            states = replace(states, values=states.through(blocks[0]))
            loss = _BELOW * (states.values - below)[text.tokens].square().mean() / spread_below
        loss = loss + (states.through(blocks[-1]) - text.dense.values)[text.tokens].square().mean() / spread
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(step + 1)


@torch.no_grad()
def _advance(states: Iterable[_States], block: nn.Module) -> None:
    for each in states:
        each.values = each.through(block)


@torch.no_grad()
def _error(texts: list[_Text], blocks: list[nn.Module]) -> float:
    """``BlockReport``'s error of what ``blocks`` make of the compressed model's states; without blocks, of those."""
    lost = count = 0.0
    targets = [text.dense.values if blocks or text.below is None else text.below for text in texts]
    for text, wanted in zip(texts, targets, strict=True):
        states = text.own
        for block in blocks:
            states = replace(states, values=states.through(block))
        difference = (states.values - wanted)[text.tokens].double()
        lost += float(difference.square().sum())
        count += difference.numel()
    return (lost / count / _spread(texts, targets)) ** 0.5


def _spread(texts: list[_Text], values: list[Any]) -> float:
    """Return the mean over features of the variance over all real tokens of ``values``, (B, L, d) for each text."""
    rows = [each[text.tokens].double() for text, each in zip(texts, values, strict=True)]
    count = sum(map(len, rows))
    mean = sum(each.sum(0) for each in rows) / count
    total = sum(float((each - mean).square().mean(1).sum()) for each in rows)
    return max(total / count, torch.finfo(torch.float32).tiny)


def _texts(teacher: Any, student: Any, batches: Iterable[Batch]) -> list[_Text]:
    """Split the batches into parts of up to ``SEQUENCES`` sequences, cut after their last real token."""
    texts = []
    for batch in batches:
        for ids, types, real in _parts(batch, student.device):
            own, wanted = (_States(ids, types, _attention_mask(model, real)) for model in (student, teacher))
            texts.append(_Text(real, own, wanted))
    if not texts:
        raise ValueError("batches: expected at least one token, got none")
    return texts


def _parts(batch: Batch, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield token ids, token types if the batch has them, and which tokens are no padding (bool), each (B, L)."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError("batches: expected mappings that hold input_ids (B, L), got one without")
    ids = batch["input_ids"]
    given = {name: batch[name] for name in ("attention_mask", "token_type_ids") if batch.get(name) is not None}
    for name, value in given.items():
        if ids.dim() != 2 or value.shape != ids.shape:
            shapes = f"{tuple(value.shape)} beside input_ids of shape {tuple(ids.shape)}"
            raise ValueError(f"{name}: expected (B, L), the shape of input_ids, got {shapes}")
    real = given["attention_mask"] != 0 if "attention_mask" in given else torch.ones_like(ids, dtype=torch.bool)
    types = given.get("token_type_ids")
    for start in range(0, len(ids), SEQUENCES):
        rows = slice(start, start + SEQUENCES)
        seen = real[rows].any(0).nonzero()
        if len(seen):
            columns = slice(0, int(seen[-1]) + 1)
            part = None if types is None else types[rows, columns].to(device)
            yield ids[rows, columns].to(device), part, real[rows, columns].to(device)


def _attention_mask(encoder: Any, real: Tensor) -> Tensor | None:
    if bool(real.all()):
        return None
    like = encoder.embeddings.LayerNorm.weight
    states = torch.empty(*real.shape, encoder.config.hidden_size, dtype=like.dtype, device=real.device)
    return create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=real)


def _encoder(name: str, model: nn.Module) -> Any:
    encoder = getattr(model, "base_model", model)
    if not isinstance(encoder, BertModel):
        raise TypeError(f"{name}: expected a BertModel or one with a head, got {type(model).__name__}")
    return encoder


def _check_pair(teacher: Any, student: Any) -> None:
    if is_quantized(student):
        raise ValueError("model: expected factors in floating point to train, got integers; quantize afterwards")
    if not any(isinstance(module, FACTORED) for module in student.modules()):
        raise ValueError("model: expected factored layers (KronBertModel.from_dense makes them), got none")
    sizes = [
        (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size)
        for model in (teacher, student)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(f"model: expected (layers, width, vocabulary) of dense, {sizes[0]}, got {sizes[1]}")


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Make every parameter at least float32 and trainable within the block; restore dtypes, flags, gradients after."""
    before = [(each, each.dtype, each.requires_grad, each.grad) for each in model.parameters()]
    for parameter, dtype, _, _ in before:
        parameter.grad = None
        if dtype.itemsize < 4:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, dtype, required, gradient in before:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)
            parameter.grad = gradient
