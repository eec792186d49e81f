"""LoKr adapters on a frozen layer (PEFT, LyCORIS and this package), GPT-2's layers of several terms, and its text.

Cases ``lokr-N-M`` and ``lokr-N-M-rank-R``: forward and backward of a frozen layer N -> M with an adapter of factor 8,
its second factor full or of rank R. ``tq-*``: TQCompressor's layers. ``gpt2``: 32 new tokens after a prompt of 32.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.baselines import module, op_candidate
from bench.suites import Point
from bench.suites import layers as ops
from kron_kernels.factorize import order_cost
from kron_kernels.testing.memory import peak_memory_growth
from kron_kernels.testing.problems import TOLERANCE, OpProblem, relative_error
from kron_kernels.testing.timing import Timing

SECONDS = 2.0
COLUMNS = ("factors", "saving", "tokens_per_second")
FACTOR, SCALING = 8, 0.5
# Rows of outputs held against float64; gradients of factors are checked whole.
CHECKED_ROWS = 32
LOKR = ("dense", "frozen layer", "PEFT", "LyCORIS", "kron_kernels")
GPT2 = ("dense", "KnGPT2", "TQCompressor", "TQCompressor-QKV")
TERMS = ("dense", "matmul", "matmul, compiled", "kron_kernels")
_TINY = {"vocab_size": 60, "n_embd": 48, "n_layer": 2, "n_head": 4}


def points(quick: bool) -> list[Point]:
    if quick:
        both = "forward+backward"
        return [Point("lokr-64-128-rank-2", both, "fp32", "16"), Point("gpt2-tiny", "forward", "fp32", "1x4")]
    lokr = [f"lokr-{layer}{rank}" for layer in ("3072-3072", "3072-12288", "4096-14336") for rank in ("", "-rank-16")]
    return [
        *(Point(case, "forward+backward", "fp32", tokens) for tokens in ("4096", "512") for case in lokr),
        *(Point(case, "forward", "fp32", tokens) for case in ("tq-w1", "tq-w2") for tokens in ("1", "128", "1024")),
        *(Point(case, "forward+backward", "fp32", "1024") for case in ("tq-w1", "tq-w2")),
        Point("gpt2", "forward", "fp32", "1x32"),
    ]


def groups(point: Point) -> list[tuple[str, ...]]:
    return [LOKR if point.case.startswith("lokr") else TERMS if point.case.startswith("tq") else GPT2]


def problem(point: Point) -> Any:
    if point.case.startswith("lokr"):
        return LokrProblem(point)
    return ops.problem(point) if point.case.startswith("tq") else TextProblem(point)


def candidate(problem: Any, name: str) -> Any:
    return op_candidate(problem, name) if isinstance(problem, OpProblem) else problem.candidate(name)


def columns(problem: Any, candidate: Any, timings: Mapping[str, Timing | None]) -> dict[str, Any]:
    if isinstance(problem, OpProblem):
        return {"factors": str(problem.case), "saving": problem.case.dense_macs / problem.case.macs}
    return problem.columns(timings.get(candidate.name))


def memory_names(point: Point) -> tuple[str, ...]:
    return LOKR if point.case.startswith("lokr") else ()


def memory(point: Point, name: str) -> int | None:
    """Return what one call adds to the process at the peak, its results included, in bytes."""
    few, whole = LokrProblem(Point(point.case, point.direction, point.dtype, "2")), LokrProblem(point)
    few.runner(few.candidate(name))()
    return peak_memory_growth(whole.runner(whole.candidate(name)))


@dataclass(frozen=True)
class Way:
    """``run(x)`` gives the layer's output (tokens, m); ``trained`` are the tensors whose gradients are asked for."""

    name: str
    run: Callable[[Tensor], Tensor]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    rest_seconds: float = 0.0


class LokrProblem:
    """``x (tokens, n)``, a frozen layer, and an adapter whose factors all candidates share."""

    sign_of_life: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, point: Point) -> None:
        n, m, rank = map(int, re.findall(r"\d+", point.case + ("" if "rank" in point.case else "-0")))
        self.rank, self.backward, self.dtype = rank, point.backward, ops.DTYPES[point.dtype]
        (tokens,) = point.sizes
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(self.dtype)

        self.x, self.grad = normal(tokens, n) * n**0.5, normal(tokens, m)
        self.base = nn.Linear(n, m, device="meta")
        self.base.weight, self.base.bias = (nn.Parameter(t, requires_grad=False) for t in (normal(m, n), normal(m)))
        second = (
            {"w2_a": (m // FACTOR, rank), "w2_b": (rank, n // FACTOR)} if rank else {"w2": (m // FACTOR, n // FACTOR)}
        )
        shapes = {"w1": (FACTOR, FACTOR), **second}
        self.factors = {name: nn.Parameter(normal(*shape)) for name, shape in shapes.items()}
        self._rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS)).long()

    def columns(self, _timing: Timing | None) -> dict[str, Any]:
        m, n = self.base.weight.shape[0] // FACTOR, self.base.weight.shape[1] // FACTOR
        rank, base = self.rank, self.base.weight.numel()
        adapter = order_cost(FACTOR, FACTOR, m, n, 1)
        least = FACTOR * n * rank + min(order_cost(FACTOR, FACTOR, m, rank, 1)) if rank else min(adapter)
        # Of PEFT's multiply-adds over those of this package: three dense products for the adapter against three small.
        return {
            "factors": f"{FACTOR}x{FACTOR} (x) {m}x{n}",
            "saving": 5 * base / (2 * base + 3 * min(least, min(adapter))),
        }

    def candidate(self, name: str) -> Way:
        if name == "frozen layer":
            return Way(name, self.base)
        if name == "dense":
            weight = self.base.weight.detach().requires_grad_()
            return Way(name, lambda x: F.linear(x, weight, self.base.bias), {"weight": weight})
        if name == "LyCORIS":
            factors = (self.factors.get(each) for each in ("w1", "w2", "w2_a", "w2_b"))
            w1, w2, w2_a, w2_b = factors
            bypass = module("lycoris.functional.lokr").kron_bypass
            run = functools.partial(_lycoris, self.base, bypass, (w1, None, None, w2, w2_a, w2_b))
            return Way(name, run, self.factors)
        layer = self._peft_layer()
        if name == "kron_kernels":
            from kron_kernels.integrations.peft_lokr import apply_kron_kernels_to_peft

            apply_kron_kernels_to_peft(layer)
        return Way(name, layer, self.factors)

    def _peft_layer(self) -> nn.Module:
        lokr, config = module("peft.tuners.lokr.layer"), module("peft").LoKrConfig(decompose_factor=FACTOR)
        rank = self.rank or max(self.base.weight.shape)
        layer = lokr.Linear(self.base, "default", config=config, r=rank, alpha=SCALING * rank)
        for name, factor in self.factors.items():
            getattr(layer, f"lokr_{name}")["default"] = factor
        return layer.train()

    def tolerance(self, _way: Way) -> float:
        return TOLERANCE[self.dtype]

    def error(self, way: Way) -> float:
        """Return the largest relative error of the output (a few rows) and of the factors' gradients."""
        x = self.x.detach().requires_grad_()
        y = way.run(x)
        got = {"y": y.detach()[self._rows]}
        trained = {} if way.name == "dense" else dict(way.trained)
        if trained:
            got |= dict(zip(trained, torch.autograd.grad(y, list(trained.values()), self.grad), strict=True))
        errors = [relative_error(value, self._want(bool(trained))[name]) for name, value in got.items()]
        return max(errors) if all(error == error for error in errors) else float("nan")  # max() lets a NaN through

    @functools.cache  # noqa: B019
    def _want(self, adapted: bool) -> dict[str, Tensor]:
        """The output's rows and the gradients of the factors through the dense weight, in float64."""
        factors = {name: factor.detach().double().requires_grad_() for name, factor in self.factors.items()}
        second = factors["w2_a"] @ factors["w2_b"] if self.rank else factors["w2"]
        weight = SCALING * torch.kron(factors["w1"], second)
        whole = (self.base.weight.double() + (weight.detach() if adapted else 0), self.base.bias.double())
        want = {"y": F.linear(self.x[self._rows].double(), *whole)}
        if not adapted:
            return want
        parts = zip(self.grad.split(512), self.x.split(512), strict=True)
        grad = torch.stack([some.double().T @ x.double() for some, x in parts]).sum(0)
        return want | dict(zip(factors, torch.autograd.grad(weight, list(factors.values()), grad), strict=True))

    def runner(self, way: Way) -> Callable[[], object]:
        """Return a function that gives the gradients of x and of what is trained."""
        x = self.x.detach().requires_grad_()
        inputs = [x, *way.trained.values()]

        def forward_backward() -> tuple[Tensor, ...]:
            self.sign_of_life()
            return torch.autograd.grad(way.run(x), inputs, self.grad)

        return forward_backward


def _lycoris(base: nn.Module, bypass: Any, factors: tuple[Any, ...], x: Tensor) -> Tensor:
    return base(x) + bypass(x, *factors, scale=SCALING)


class TextProblem:
    """A prompt of 32 random tokens that a random GPT-2 continues greedily, with its cache."""

    def __init__(self, point: Point) -> None:
        from transformers import GPT2Config

        self._sizes, (_, self._new) = (_TINY if point.case.endswith("tiny") else {}), point.sizes
        torch.manual_seed(0)
        self.ids = torch.randint(GPT2Config(**self._sizes).vocab_size, (1, 32))

    def candidate(self, name: str) -> Way:
        from transformers import GPT2Config, GPT2LMHeadModel

        from kron_kernels.models.gpt2 import KronGPT2Config, KronGPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(**self._sizes) if name == "dense" else KronGPT2Config(**self._sizes, kron=name)
        model: Any = (GPT2LMHeadModel if name == "dense" else KronGPT2LMHeadModel)(config).eval()
        return Way(name, model)

    def columns(self, timing: Timing | None) -> dict[str, Any]:
        return {"tokens_per_second": self._new / timing.seconds.q50} if timing else {}

    def tolerance(self, _way: Way) -> float:
        return 1e-4

    @torch.inference_mode()
    def error(self, way: Way) -> float:
        """Return the relative error of the prompt's logits, the last token's by the cache, against float64."""
        from kron_kernels.models.gpt2 import reconstruct_dense

        model: Any = way.run
        want = reconstruct_dense(model).double()(self.ids).logits[0]
        first = model(self.ids[:, :-1], use_cache=True)
        last = model(self.ids[:, -1:], first.past_key_values)
        return relative_error(torch.cat([first.logits[0], last.logits[0]]), want)

    def runner(self, way: Way) -> Callable[[], object]:
        # min_new_tokens: a random model may otherwise end early.
        asked = {"max_new_tokens": self._new, "min_new_tokens": self._new, "do_sample": False, "pad_token_id": 0}
        model: Any = way.run
        return functools.partial(model.generate, self.ids, **asked)
