"""What the GPT-2 benchmark computes, and the ways to: layers of several terms, and text from a whole model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from kron_kernels.factorize import order_cost
from kron_kernels.models.gpt2 import KronGPT2Config, KronGPT2LMHeadModel, reconstruct_dense
from kron_kernels.nn.linear import kron_linear
from kron_kernels.schemas import reference
from kron_kernels.testing.problem import Candidate, Problem, random_normal, relative_error

DENSE, B_FIRST, A_FIRST, OURS = "dense", "einsum B first", "einsum A first", "kron_kernels"
LAYER_WAYS = (DENSE, B_FIRST, A_FIRST, OURS)


@dataclass(frozen=True)
class TermsCase:
    """A layer of ``terms`` pairs, A ``(m1, n1)`` and B ``(m2, n2)`` of weights of (out, in)."""

    name: str
    a: tuple[int, int]
    b: tuple[int, int]
    terms: int = 1

    @property
    def macs(self) -> int:
        """Multiply-adds a token in the cheaper order."""
        return min(order_cost(*self.a, *self.b, self.terms))

    @property
    def dense_macs(self) -> int:
        return self.a[0] * self.b[0] * self.a[1] * self.b[1]

    def __str__(self) -> str:
        pair = f"{self.a[0]}x{self.a[1]} (x) {self.b[0]}x{self.b[1]}"
        return pair if self.terms == 1 else f"{self.terms} of {pair}"


# The layers of GPT-2 small under the presets of those names.
CASES = {
    case.name: case
    for case in (
        TermsCase("tqcompressor-c_fc", (768, 384), (4, 2), 4),
        TermsCase("tqcompressor-c_proj", (384, 768), (2, 4), 4),
        TermsCase("kngpt2-c_attn", (2304, 384), (1, 2)),
        TermsCase("kngpt2-attn-c_proj", (768, 384), (1, 2)),
        TermsCase("kngpt2-c_fc", (3072, 384), (1, 2)),
        TermsCase("kngpt2-c_proj", (768, 1536), (1, 2)),
        TermsCase("smoke", (6, 4), (2, 3), 2),
    )
}


@dataclass(frozen=True)
class TermsWeights:
    """Random weights: a ``(S, m1, n1)``, b ``(S, m2, n2)``, bias ``(m,)``, and the weight ``(m, n)`` they make."""

    a: Tensor
    b: Tensor
    bias: Tensor
    weight: Tensor


class TermsProblem(Problem):
    """One layer of several terms on ``x (tokens, n)``, its weights in cache; float32."""

    def __init__(self, case: TermsCase, tokens: int, backward: bool) -> None:
        self.case, self.tokens, self.backward, self.dtype = case, tokens, backward, torch.float32
        normal = random_normal(self.dtype)
        (m1, n1), (m2, n2) = case.a, case.b
        self.x, self.grad = normal(tokens, n1 * n2), normal(tokens, m1 * m2)
        a = normal(case.terms, m1, n1, scale=n1**-0.5)
        b = normal(case.terms, m2, n2, scale=(n2 * case.terms) ** -0.5)
        self.weights = [TermsWeights(a, b, normal(m1 * m2), reference.kron_weight(a, b))]

    def tolerance(self, candidate: Candidate) -> float:
        # A gradient of B's is a sum of a million products that all but cancel, here two such sums are the whole of it.
        return 3e-4 if self.backward else super().tolerance(candidate)

    def reference(self) -> dict[str, Tensor]:
        weights, x, grad = self.weights[0], self.x.double(), self.grad.double()
        a, b = weights.a.double(), weights.b.double()
        want = {"y": reference.kron_matmul(x, a, b, weights.bias.double())}
        if self.backward:
            dx, da, db, dbias = reference.kron_matmul_backward(grad, x, a, b)
            want |= {"x": dx, "a": da, "b": db, "bias": dbias, "weight": grad.T @ x}
        return want


def einsum_b_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Two einsums, B's first, as TQCompressor's and KnGPT2's published layers contract."""
    middle = torch.einsum("tjl,skl->stjk", x.view(-1, a.shape[2], b.shape[2]), b)
    return torch.einsum("sij,stjk->tik", a, middle).reshape(x.shape[0], -1) + bias


def einsum_a_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """The same in the other order."""
    middle = torch.einsum("sij,tjl->stil", a, x.view(-1, a.shape[2], b.shape[2]))
    return torch.einsum("stil,skl->tik", middle, b).reshape(x.shape[0], -1) + bias


def layer_way(problem: TermsProblem, name: str) -> Candidate:
    """The way of one of LAYER_WAYS."""
    factors = ("a", "b", "bias")
    if name == DENSE:
        return Candidate(name, F.linear, lambda weights, _: (weights.weight, weights.bias), ("weight", "bias"))
    function: Callable[..., Tensor] = {B_FIRST: einsum_b_first, A_FIRST: einsum_a_first, OURS: kron_linear}[name]
    return Candidate(name, function, lambda weights, _: (weights.a, weights.b, weights.bias), factors)


@dataclass(frozen=True)
class TextWay:
    """A model that writes text."""

    name: str
    model: GPT2LMHeadModel
    rest_seconds: float = 0.0


class TextProblem:
    """A prompt of random tokens that a model continues, greedily, with its cache; batch 1."""

    def __init__(self, prompt: int, new: int, **sizes: int) -> None:
        torch.manual_seed(0)
        self._sizes, self.new = sizes, new
        self.ids = torch.randint(GPT2Config(**sizes).vocab_size, (1, prompt))

    def way(self, name: str) -> TextWay:
        """A random GPT-2, dense or of a preset."""
        torch.manual_seed(0)
        config = GPT2Config(**self._sizes) if name == DENSE else KronGPT2Config(**self._sizes, kron=name)
        return TextWay(name, (GPT2LMHeadModel if name == DENSE else KronGPT2LMHeadModel)(config).eval())

    def refusal(self, _way: TextWay) -> str:
        return ""

    def tolerance(self, _way: TextWay) -> float:
        return 1e-4

    @torch.inference_mode()
    def error(self, way: TextWay) -> float:
        """Relative error of the logits of the prompt, its last token by the cache, against float64 without one."""
        exact: nn.Module = reconstruct_dense(way.model).double()
        want = exact(self.ids).logits[0]
        first = way.model(self.ids[:, :-1], use_cache=True)
        last = way.model(self.ids[:, -1:], first.past_key_values)  # by place: its name is changing
        return relative_error(torch.cat([first.logits[0], last.logits[0]]), want)

    def runner(self, way: TextWay) -> Callable[[], object]:
        # min_new_tokens: a random model may otherwise end early.
        asked = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False, "pad_token_id": 0}
        return functools.partial(way.model.generate, self.ids, **asked)
