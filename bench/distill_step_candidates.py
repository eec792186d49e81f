"""One training step of distillation, by our layers and by stock torch's: the students, and how each is checked.

Everything but the student's layers is the same: DistillTrainer with its losses and its teacher, and AdamW.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from kron_kernels.convert.kronify import kronify_
from kron_kernels.distill.losses import LossConfig
from kron_kernels.distill.objectives import Classification
from kron_kernels.distill.teacher import TeacherOutputs
from kron_kernels.distill.trainer import DistillTrainer
from kron_kernels.factorize import order_cost
from kron_kernels.models import KronBertConfig, KronBertForSequenceClassification
from kron_kernels.nn import KronEmbedding, KronLinear
from kron_kernels.testing.layers import a_first, b_first
from kron_kernels.testing.problem import relative_error

OURS, STOCK, COMPILED, DENSE = "kron_kernels", "matmul", "matmul, compiled", "dense"
NAMES = (DENSE, STOCK, COMPILED, OURS)
# Largest relative error of a term of the loss, and of a parameter's gradient, against float64: rounding gathered on
# the way through all layers and back.
TOLERANCE = 1e-4
LABELS = 2
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """A BERT by fields of its configuration, and the batch that it is trained on."""

    batch: int
    length: int
    fields: dict[str, int] = field(default_factory=dict)

    def config(self) -> BertConfig:
        """Without dropout, as students are distilled."""
        options: Any = {**self.fields, "num_labels": LABELS}
        return BertConfig(**options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def small(self) -> Size:
        """The same layers, one of them, on a few tokens."""
        return Size(2, 8, {**self.fields, "num_hidden_layers": 1, "vocab_size": 50})

    def random_batch(self) -> Batch:
        """Sequences without padding, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.config().vocab_size
        ids = torch.randint(1, vocabulary, (self.batch, self.length), generator=generator)
        labels = torch.randint(LABELS, (self.batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


_MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
_SMOKE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {
    "minilm": Size(32, 32, _MINILM),
    "bert-base": Size(16, 128),
    "smoke": Size(4, 16, {**_SMOKE, "vocab_size": 500}),
}


class StockLinear(KronLinear):
    """The two matrix products of stock torch, in the order of fewer multiply-adds."""

    def forward(self, x: Tensor) -> Tensor:
        (m1, n1), (m2, n2) = self.shapes
        b_cost, a_cost = order_cost(m1, n1, m2, n2)
        # Where both cost the same (K8's attention) A first is the quicker.
        product = b_first if b_cost < a_cost else a_first
        return product(x.flatten(0, -2), self.a[0], self.b[0], self.bias).unflatten(0, x.shape[:-1])


class StockEmbedding(KronEmbedding):
    """A gather of A's rows and their products with B's values."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.a[0], self.padding_idx)
        return (rows.unsqueeze(-1) * self.b[0]).flatten(-2)


_STOCK_CLASSES: dict[type[nn.Module], type[nn.Module]] = {KronLinear: StockLinear, KronEmbedding: StockEmbedding}


class TrainStep:
    """A step of DistillTrainer on one batch, again and again; the optimiser is the Trainer's own."""

    def __init__(self, student: Any, teacher: Any, batch: Batch) -> None:
        losses, objective = LossConfig(), Classification(LABELS)
        options: Any = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-5}
        self.student = student
        self._batch = batch
        self._terms: dict[str, Tensor] = {}
        self._trainer = DistillTrainer(
            model=student,
            args=TrainingArguments(output_dir=tempfile.gettempdir(), **options),
            teacher=TeacherOutputs(teacher, losses, objective),
            losses=losses,
            objective=objective,
            on_terms=self._keep,
        )
        self._optimizer = self._trainer.create_optimizer()

    def __call__(self) -> None:
        """Student and teacher forward, all losses, backward, clipping, AdamW."""
        self._trainer.training_step(self.student, self._batch)
        nn.utils.clip_grad_norm_(self.student.parameters(), self._trainer.args.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def outcome(self) -> dict[str, Tensor]:
        """Every term of the loss and every parameter's gradient by name; nothing is updated."""
        self._trainer.training_step(self.student, self._batch)
        gradients = {name: each.grad for name, each in self.student.named_parameters() if each.grad is not None}
        self._optimizer.zero_grad()
        return {**self._terms, **gradients}

    def _keep(self, terms: dict[str, Tensor], _step: int) -> None:
        self._terms = {name: value.detach() for name, value in terms.items()}


@dataclass(frozen=True)
class StepWay:
    """A way to do the step; ``model`` says by which float64 model it is judged."""

    name: str
    step: TrainStep
    model: str
    rest_seconds: float = 0.0


class Students:
    """The teacher and the students of one size and preset; all factored ones have the same weights."""

    def __init__(self, size: Size, preset: str) -> None:
        torch.manual_seed(0)
        self._config = size.config()
        self._kron = preset
        self.batch = size.random_batch()
        self.teacher = BertForSequenceClassification(self._config)
        self._ours = KronBertForSequenceClassification(KronBertConfig.from_dense(self._config, preset))

    def way(self, name: str) -> StepWay:
        """The way of that name; ``torch.compiler.reset()`` belongs before a compiled one of another size."""
        makers: dict[str, Callable[[], nn.Module]] = {
            DENSE: self._dense,
            STOCK: self._stock,
            COMPILED: lambda: compile_parts_(self._stock()),
            OURS: lambda: self._ours,
        }
        step = TrainStep(makers[name](), self.teacher, self.batch)
        return StepWay(name, step, DENSE if name == DENSE else STOCK)

    def exact(self, model: str) -> TrainStep:
        """The step in float64: of the dense student, or of the factored ones by stock torch."""
        student = self._dense() if model == DENSE else self._stock()
        return TrainStep(student.double(), copy.deepcopy(self.teacher).double(), self.batch)

    def _dense(self) -> nn.Module:
        torch.manual_seed(1)
        return BertForSequenceClassification(self._config)

    def _stock(self) -> nn.Module:
        """Transformers' own modules around factored layers of stock torch."""
        student: Any = BertForSequenceClassification(self._config)
        kronify_(student, self._kron, fit=False)
        for module in student.modules():
            module.__class__ = _STOCK_CLASSES.get(type(module), type(module))
        student.load_state_dict(self._ours.state_dict())
        return student


def compile_parts_(student: Any) -> Any:
    """torch.compile of all that lies between the places that a distillation looks at; in place, and returned.

    Queries, keys and the layers' outputs are taken by hooks, set anew in every step: the compiled parts end there. Of a
    layer, attention itself is left, one op of torch.
    """

    def compiled(function: Any) -> Any:
        return torch.compile(function, dynamic=False)

    bert = student.bert
    bert.embeddings.forward = compiled(bert.embeddings.forward)
    for layer in bert.encoder.layer:
        attention = layer.attention
        for part in (attention.self.query, attention.self.key, attention.self.value, attention.output):
            part.forward = compiled(part.forward)
        layer.feed_forward_chunk = compiled(layer.feed_forward_chunk)
    return student


class StepProblem:
    """What a step has to come to: the float64 outcome of each model, computed when first asked for.

    ``sign_of_life`` is called after each step that is timed: all of them together may take minutes.
    """

    def __init__(self, students: Students, sign_of_life: Callable[[], None] = lambda: None) -> None:
        self._students = students
        self._sign_of_life = sign_of_life
        self._want: dict[str, dict[str, Tensor]] = {}

    def refusal(self, _way: StepWay) -> str:
        return ""

    def tolerance(self, _way: StepWay) -> float:
        return TOLERANCE

    def error(self, way: StepWay) -> float:
        """Largest relative error of a term or of a parameter's gradient; NaN where they are not the same ones."""
        if way.model not in self._want:
            self._want[way.model] = self._students.exact(way.model).outcome()
        got, want = way.step.outcome(), self._want[way.model]
        if got.keys() != want.keys():
            return float("nan")
        errors = [relative_error(got[name], want[name]) for name in want]
        # max() would let a NaN through.
        return max(errors) if all(error == error for error in errors) else float("nan")

    def runner(self, way: StepWay) -> Callable[[], object]:
        def run() -> None:
            way.step()
            self._sign_of_life()

        return run
