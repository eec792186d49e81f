"""A training step of distillation: this package's layers, stock torch's products of the factors, and a dense student.

Teacher and student forward, all losses, backward, clipping and AdamW; float32. Everything but the layers is the same.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from bench.suites import Point
from kron_kernels.convert.kronify import kronify_
from kron_kernels.distill.losses import LossConfig
from kron_kernels.distill.objectives import Classification
from kron_kernels.distill.trainer import DistillTrainer, TeacherOutputs
from kron_kernels.factorize import order_cost
from kron_kernels.models import KronBertConfig, KronBertForSequenceClassification
from kron_kernels.nn import KronEmbedding, KronLinear
from kron_kernels.testing.memory import peak_memory_growth
from kron_kernels.testing.problems import a_first, b_first, relative_error
from kron_kernels.testing.timing import Timing

SECONDS = 4.0
COLUMNS = ("parameters",)
DENSE, STOCK, COMPILED, OURS = "dense", "matmul", "matmul, compiled", "kron_kernels"
# Largest relative error of a term of the loss and of a parameter's gradient, gathered through all layers and back.
TOLERANCE = 1e-4
LABELS, MEMORY_STEPS = 2, 3
_MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
_TINY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES: dict[str, dict[str, int]] = {"minilm": _MINILM, "bert-base": {}, "tiny": {**_TINY, "vocab_size": 500}}


def points(quick: bool) -> list[Point]:
    """Cases are a size and a preset, inputs batch x sequence."""
    inputs = {"tiny": "4x16"} if quick else {"minilm": "32x32", "bert-base": "16x128"}
    presets = ("K8",) if quick else ("K8", "K21")
    return [Point(f"{size} {preset}", "step", "fp32", shape) for size, shape in inputs.items() for preset in presets]


def groups(point: Point) -> list[tuple[str, ...]]:
    return [(DENSE, STOCK, COMPILED, OURS)]


class StockLinear(KronLinear):
    """The two matrix products of stock torch, in the order of fewer multiply-adds."""

    def forward(self, x: Tensor) -> Tensor:
        (m1, n1), (m2, n2) = self.shapes
        b_cost, a_cost = order_cost(m1, n1, m2, n2)
        # Where both cost the same (K8's attention) A first is the quicker.
        product = b_first if b_cost < a_cost else a_first
        return product(x.flatten(0, -2), self.a, self.b, self.bias).unflatten(0, x.shape[:-1])


class StockEmbedding(KronEmbedding):
    """A gather of A's rows and their products with B's values."""

    def forward(self, ids: Tensor) -> Tensor:
        return (F.embedding(ids, self.a[0], self.padding_idx).unsqueeze(-1) * self.b[0]).flatten(-2)


_STOCK_CLASSES: dict[type[nn.Module], type[nn.Module]] = {KronLinear: StockLinear, KronEmbedding: StockEmbedding}


class TrainStep:
    """A step of DistillTrainer on one batch, again and again; the optimiser is the Trainer's own."""

    def __init__(self, student: Any, teacher: Any, batch: dict[str, Tensor]) -> None:
        losses, objective = LossConfig(), Classification(LABELS)
        options: Any = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-5}
        self.student, self._batch = student, batch
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
        """Train on the batch once."""
        self._trainer.training_step(self.student, self._batch)
        nn.utils.clip_grad_norm_(self.student.parameters(), self._trainer.args.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def outcome(self) -> dict[str, Tensor]:
        """Return every term of the loss and every parameter's gradient by name; nothing is updated."""
        self._trainer.training_step(self.student, self._batch)
        gradients = {name: each.grad for name, each in self.student.named_parameters() if each.grad is not None}
        self._optimizer.zero_grad()
        return {**self._terms, **gradients}

    def _keep(self, terms: dict[str, Tensor], _step: int) -> None:
        self._terms = {name: value.detach() for name, value in terms.items()}


@dataclass(frozen=True)
class Step:
    """A student's step; ``reference`` names the float64 student that says what is right."""

    name: str
    step: TrainStep
    reference: str
    rest_seconds: float = 0.0


class StepProblem:
    """The teacher, one batch and the students of a point; all factored students have the same weights."""

    sign_of_life: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, point: Point, **sizes: int) -> None:
        size, self._preset = point.case.split()
        options: Any = {**SIZES[size], **sizes, "num_labels": LABELS}
        self._config = BertConfig(**options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        torch.manual_seed(0)
        ids = torch.randint(1, self._config.vocab_size, point.sizes)
        labels = torch.randint(LABELS, ids.shape[:1])
        self._batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self._teacher = BertForSequenceClassification(self._config)
        self._ours = KronBertForSequenceClassification(KronBertConfig.from_dense(self._config, self._preset))
        self._want: dict[str, dict[str, Tensor]] = {}

    def candidate(self, name: str) -> Step:
        makers: dict[str, Callable[[], nn.Module]] = {
            DENSE: self._dense,
            STOCK: self._stock,
            COMPILED: lambda: compile_parts_(self._stock()),
            OURS: lambda: self._ours,
        }
        step = TrainStep(makers[name](), self._teacher, self._batch)
        return Step(name, step, DENSE if name == DENSE else STOCK)

    def tolerance(self, _candidate: Step) -> float:
        return TOLERANCE

    def error(self, candidate: Step) -> float:
        """Return the largest relative error of a term or a gradient; NaN where they are not the same ones."""
        got, want = candidate.step.outcome(), self._exact(candidate.reference)
        if got.keys() != want.keys():
            return float("nan")
        errors = [relative_error(got[name], want[name]) for name in want]
        return max(errors) if all(error == error for error in errors) else float("nan")  # max() lets a NaN through

    def runner(self, candidate: Step) -> Callable[[], object]:
        def run() -> None:
            candidate.step()
            self.sign_of_life()

        return run

    def _exact(self, reference: str) -> dict[str, Tensor]:
        if reference not in self._want:
            student = (self._dense() if reference == DENSE else self._stock()).double()
            exact = TrainStep(student, copy.deepcopy(self._teacher).double(), self._batch)
            self._want[reference] = exact.outcome()
        return self._want[reference]

    def _dense(self) -> nn.Module:
        torch.manual_seed(1)
        return BertForSequenceClassification(self._config)

    def _stock(self) -> nn.Module:
        """Transformers' own modules around factored layers of stock torch."""
        student: Any = BertForSequenceClassification(self._config)
        kronify_(student, self._preset, fit=False)
        for module in student.modules():
            module.__class__ = _STOCK_CLASSES.get(type(module), type(module))
        student.load_state_dict(self._ours.state_dict())
        return student


problem = StepProblem


def compile_parts_(student: Any) -> Any:
    """Compile all that lies between the places a distillation looks at, in place: its hooks end the compiled parts."""
    compiled = functools.partial(torch.compile, dynamic=False)
    bert = student.bert
    bert.embeddings.forward = compiled(bert.embeddings.forward)
    for layer in bert.encoder.layer:
        attention = layer.attention
        for part in (attention.self.query, attention.self.key, attention.self.value, attention.output):
            part.forward = compiled(part.forward)
        layer.feed_forward_chunk = compiled(layer.feed_forward_chunk)
    return student


def candidate(problem: StepProblem, name: str) -> Step:
    return problem.candidate(name)


def columns(_problem: StepProblem, candidate: Step, _timings: Mapping[str, Timing | None]) -> dict[str, Any]:
    return {"parameters": sum(each.numel() for each in candidate.step.student.parameters())}


def memory_names(point: Point) -> tuple[str, ...]:
    return groups(point)[0] if not point.case.startswith("tiny") else (DENSE, OURS)


def memory(point: Point, name: str) -> int | None:
    """Return what a few steps add at the peak to a process that has models and optimiser, in bytes."""
    few = Point(point.case, point.direction, point.dtype, "2x8")
    StepProblem(few, num_hidden_layers=1, vocab_size=50).candidate(STOCK if name == COMPILED else name).step()
    step = StepProblem(point).candidate(name).step
    if name == COMPILED:
        step.outcome()  # what the compiler takes is not what a step takes
    return peak_memory_growth(lambda: [step() for _ in range(MEMORY_STEPS)])
