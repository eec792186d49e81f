"""A LoKr adapter on a frozen linear layer, whole and without the layer, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.candidates import module
from kron_kernels import kron_addmm_
from kron_kernels.factorize import order_cost
from kron_kernels.schemas import reference
from kron_kernels.testing.problem import TOLERANCE, random_normal, relative_error

BASE, DENSE, PEFT, OURS = "base alone", "dense", "PEFT", "kron_kernels"
BYPASS, WEIGHT = "LyCORIS, bypass", "LyCORIS, weight"
# With the frozen layer, and what the adapter adds to a result that is there.
PARTS: dict[str, tuple[str, ...]] = {
    "layer": (DENSE, BASE, PEFT, WEIGHT, BYPASS, OURS),
    "adapter": (DENSE, PEFT, WEIGHT, BYPASS, OURS),
}
FACTOR, SCALING = 8, 0.5
# Rows of outputs and of weight gradients held against float64; gradients of factors are checked whole.
CHECKED_ROWS = 32
_CHUNK = 512


@dataclass(frozen=True)
class LokrCase:
    """A layer ``n -> m`` and the second factor of its adapter: full (rank 0) or of a rank."""

    n: int
    m: int
    rank: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(m1, n1), (m2, n2)``."""
        return (FACTOR, FACTOR), (self.m // FACTOR, self.n // FACTOR)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds a token of the frozen layer."""
        return self.m * self.n

    @property
    def macs(self) -> int:
        """Multiply-adds a token of the adapter by its factors, in the cheapest order."""
        (m1, n1), (m2, n2) = self.shapes
        full = min(order_cost(m1, n1, m2, n2, 1))
        return min(full, n1 * n2 * self.rank + min(order_cost(m1, n1, m2, self.rank, 1))) if self.rank else full


def macs(case: LokrCase, part: str, name: str, backward: bool) -> int:
    """Multiply-adds a token of a way, without what building a weight takes once a call.

    A product has one more in backward for x, and one for a weight that is trained.
    """
    both, frozen = (3, 2) if backward else (1, 1)
    layer = frozen * case.dense_macs if part == "layer" else 0
    return {
        DENSE: both * case.dense_macs,
        BASE: layer,
        PEFT: layer + both * case.dense_macs,
        WEIGHT: both * case.dense_macs,
        BYPASS: layer + both * case.macs,
        OURS: layer + both * case.macs,
    }[name]


def ceiling(case: LokrCase, part: str, backward: bool) -> float:
    """How many times faster than PEFT a way can be, by its multiply-adds.

    With the layer: PEFT's over the frozen layer's own, for an adapter that costs nothing. Without: PEFT's over those of
    the factors.
    """
    return macs(case, part, PEFT, backward) / macs(case, part, BASE if part == "layer" else OURS, backward)


@dataclass(frozen=True)
class LokrWay:
    """``run(x, given)``: the layer's output ``(tokens, m)``, or ``given (tokens, m)`` with the adapter's part added.

    ``given`` may be written to. ``leaves`` are what is trained.
    """

    name: str
    run: Callable[[Tensor, Tensor], Tensor]
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    rest_seconds: float = 0.0


class LokrProblem:
    """One measurement: ``x (tokens, n)``, the frozen layer, and an adapter whose factors all ways share."""

    def __init__(
        self,
        case: LokrCase,
        tokens: int,
        dtype: torch.dtype,
        backward: bool,
        part: str,
        sign_of_life: Callable[[], None] = lambda: None,
    ) -> None:
        self.case, self.tokens, self.dtype, self.backward, self.part = case, tokens, dtype, backward, part
        self._sign_of_life = sign_of_life
        normal = random_normal(dtype)
        (m1, n1), (m2, n2) = case.shapes
        self.x, self.grad = normal(tokens, case.n), normal(tokens, case.m)
        self.given = normal(tokens, case.m) if part == "adapter" else self.x
        self.base = nn.Linear(case.n, case.m, device="meta")
        self.base.weight = nn.Parameter(normal(case.m, case.n, scale=case.n**-0.5), requires_grad=False)
        self.base.bias = nn.Parameter(normal(case.m), requires_grad=False)
        factors = {"w1": normal(m1, n1, scale=n1**-0.5)}
        if case.rank:
            factors["w2_a"] = normal(m2, case.rank, scale=case.rank**-0.5)
            factors["w2_b"] = normal(case.rank, n2, scale=n2**-0.5)
        else:
            factors["w2"] = normal(m2, n2, scale=n2**-0.5)
        self.factors = {name: nn.Parameter(factor, requires_grad=backward) for name, factor in factors.items()}

    def way(self, name: str) -> LokrWay:
        """A way by its name; raises ``Missing`` where its library is not there."""
        if name == BASE:
            return LokrWay(name, lambda x, _: self.base(x))
        if name == DENSE:
            weight = self.base.weight.detach().requires_grad_(self.backward)
            return LokrWay(name, lambda x, _: F.linear(x, weight, self.base.bias), {"weight": weight})
        if name in (BYPASS, WEIGHT):
            return LokrWay(name, self._lycoris(name == BYPASS), self.factors)
        layer = self._peft_layer()
        if name == OURS:
            from kron_kernels.integrations.peft_lokr import apply_kron_kernels_to_peft

            apply_kron_kernels_to_peft(layer)
        if self.part == "layer":
            return LokrWay(name, lambda x, _: layer(x), self.factors)
        if name == PEFT:
            return LokrWay(name, lambda x, given: given + layer._get_delta_activations("default", x), self.factors)
        w1, *w2 = self.factors.values()
        right = (w2[0], w2[1]) if self.case.rank else w2[0]
        return LokrWay(name, lambda x, given: kron_addmm_(given, x, w1, right, alpha=SCALING), self.factors)

    def _peft_layer(self) -> nn.Module:
        """PEFT's layer around the frozen one, with our factors."""
        lokr = module("peft.tuners.lokr.layer")
        config = module("peft").LoKrConfig(decompose_factor=FACTOR)
        rank = self.case.rank or max(self.case.m, self.case.n)
        layer = lokr.Linear(self.base, "default", config=config, r=rank, alpha=SCALING * rank)
        for name, factor in self.factors.items():
            own = getattr(layer, f"lokr_{name}")
            assert own["default"].shape == factor.shape
            own["default"] = factor
        return layer.train(self.backward)

    def _lycoris(self, bypass: bool) -> Callable[[Tensor, Tensor], Tensor]:
        lokr = module("lycoris.functional.lokr")
        w1, w2, w2_a, w2_b = (self.factors.get(name) for name in ("w1", "w2", "w2_a", "w2_b"))
        factors = (w1, None, None, w2, w2_a, w2_b)
        base, with_layer = self.base, self.part == "layer"
        if bypass:
            return lambda x, given: (base(x) if with_layer else given) + lokr.kron_bypass(x, *factors, scale=SCALING)
        if with_layer:
            return lambda x, _: F.linear(x, base.weight + lokr.kron_weight(*factors, scale=SCALING), base.bias)
        return lambda x, given: given + F.linear(x, lokr.kron_weight(*factors, scale=SCALING))

    def refusal(self, _way: LokrWay) -> str:
        """No way refuses."""
        return ""

    def tolerance(self, _way: LokrWay) -> float:
        """The largest error of a right result."""
        return TOLERANCE[self.dtype]

    def error(self, way: LokrWay) -> float:
        """Largest relative error of the output and each gradient, against float64."""
        rows = _sample(self.tokens)
        x = self.x.detach().requires_grad_(self.backward)
        y = way.run(x, self.given.clone())
        want = self._want(way.name)
        got = {"y": y.detach()[rows]}
        if self.backward:
            gradients = torch.autograd.grad(y, [x, *way.leaves.values()], self.grad)
            got |= dict(zip(("x", *way.leaves), gradients, strict=True))
            got["x"] = got["x"][rows]
            if "weight" in got:
                got["weight"] = got["weight"][_sample(self.case.m)]
        errors = [relative_error(value, want[name]) for name, value in got.items()]
        return max(errors) if all(error == error for error in errors) else float("nan")  # max() lets a NaN through

    def _want(self, name: str) -> dict[str, Tensor]:
        """Output, gradient of x (sampled rows of both) and gradients of what a way trains."""
        rows = _sample(self.tokens)
        has_layer = self.part == "layer" or name == DENSE
        has_adapter = name not in (BASE, DENSE)
        y = self._of_layer["y"] if has_layer else self.given[rows].double()
        x = self._of_layer["x"] if has_layer else torch.zeros_like(self._of_layer["x"])
        if not has_adapter:
            return {"y": y, "x": x, **({"weight": self._of_layer["weight"]} if self.backward else {})}
        adapter = self._of_adapter
        return {**adapter, "y": y + adapter["y"], "x": x + adapter["x"]}

    @cached_property
    def _of_layer(self) -> dict[str, Tensor]:
        rows, columns = _sample(self.tokens), _sample(self.case.m)
        weight, bias = self.base.weight.double(), self.base.bias.double()
        return {
            "y": F.linear(self.x[rows].double(), weight, bias),
            "x": self.grad[rows].double() @ weight,
            "weight": self.grad[:, columns].double().T @ self.x.double() if self.backward else torch.empty(0),
        }

    @cached_property
    def _of_adapter(self) -> dict[str, Tensor]:
        factors = {name: factor.detach().double() for name, factor in self.factors.items()}
        a = SCALING * factors["w1"][None]
        b = (factors["w2_a"] @ factors["w2_b"] if self.case.rank else factors["w2"])[None]
        rows = _sample(self.tokens)
        x, grad = self.x.double(), self.grad.double()
        want = {
            "y": reference.kron_matmul(x[rows], a, b),
            "x": reference.kron_matmul_backward(grad[rows], x[rows], a, b)[0],
        }
        if not self.backward:
            return want
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for some_grad, some_x in zip(grad.split(_CHUNK), x.split(_CHUNK), strict=True):
            _, part_a, part_b, _ = reference.kron_matmul_backward(some_grad, some_x, a, b)
            da, db = da + part_a, db + part_b
        want["w1"] = SCALING * da[0]
        if self.case.rank:
            return {**want, "w2_a": db[0] @ factors["w2_b"].T, "w2_b": factors["w2_a"].T @ db[0]}
        return {**want, "w2": db[0]}

    def runner(self, way: LokrWay) -> Callable[[], object]:
        """A function of no arguments that computes once, and gives a sign of life."""
        if not self.backward:

            def forward() -> Tensor:
                self._sign_of_life()
                with torch.inference_mode():
                    return way.run(self.x, self.given)

            return forward
        x = self.x.detach().requires_grad_()
        leaves = [x, *way.leaves.values()]

        def forward_backward() -> tuple[Tensor, ...]:
            self._sign_of_life()
            return torch.autograd.grad(way.run(x, self.given.detach()), leaves, self.grad)

        return forward_backward


def _sample(size: int) -> Tensor:
    """Indices spread over ``range(size)``, its ends among them."""
    return torch.linspace(0, size - 1, min(size, CHECKED_ROWS)).round().long()
