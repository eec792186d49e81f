"""Forward-mode derivatives of every public function: equal to those of the same function of the dense weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.nn import functional as F

from kron_kernels import (
    AddNorm,
    kron_addmm,
    kron_addmm_,
    kron_embedding,
    kron_ffn,
    kron_matmul,
    kron_matmul_norm,
    kron_qkv,
)
from kron_kernels.ops import frozen_linear_kron
from kron_kernels.schemas.reference import kron_weight

Function = Callable[..., Tensor]
N, TOKENS = 6, 3
IDS = torch.tensor([0, 2, 3, 2])


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) / 2


WEIGHT, VECTOR, RESIDUAL = made(N, N), made(N, seed=1), made(TOKENS, N, seed=2)
P, Q = made(3, 2, seed=3), made(2, 3, seed=4)


def norm(y: Tensor) -> Tensor:
    return F.layer_norm(RESIDUAL + y, (N,), VECTOR, VECTOR, 1e-5)


def dense(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, kron_weight(a, b), bias)


# By name: the function of x (T, 6), a (2, 2, 2), b (2, 3, 3), and the same of the dense weight.
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "kron_matmul": (
        lambda x, a, b: kron_matmul(x, a, b, VECTOR, activation="gelu"),
        lambda x, a, b: F.gelu(dense(x, a, b, VECTOR)),
    ),
    "kron_matmul-residual": (lambda x, a, b: x + kron_matmul(x, a, b), lambda x, a, b: x + dense(x, a, b)),
    "kron_addmm": (
        lambda x, a, b: kron_addmm(x.sin(), x, a, b, alpha=0.5),
        lambda x, a, b: x.sin() + 0.5 * dense(x, a, b),
    ),
    "kron_addmm-low-rank": (
        lambda x, a, b: kron_addmm(x, x, a[0], (P, Q)),
        lambda x, a, b: x + dense(x, a[:1], (P @ Q).unsqueeze(0)),
    ),
    "kron_addmm_": (
        lambda x, a, b: kron_addmm_(x.sin(), x, a, b, alpha=0.5),
        lambda x, a, b: x.sin() + 0.5 * dense(x, a, b),
    ),
    "kron_matmul_norm": (
        lambda x, a, b: kron_matmul_norm(x, a, b, VECTOR, AddNorm(RESIDUAL, VECTOR, VECTOR, 1e-5)),
        lambda x, a, b: norm(dense(x, a, b, VECTOR)),
    ),
    "kron_ffn": (
        lambda x, a, b: kron_ffn(x, a, b, VECTOR, a.mT, b.mT, None),
        lambda x, a, b: dense(F.gelu(dense(x, a, b, VECTOR)), a.mT, b.mT),
    ),
    "kron_ffn-norm": (
        lambda x, a, b: kron_ffn(x, a, b, None, a, b, None, norm=AddNorm(RESIDUAL, VECTOR, VECTOR, 1e-5)),
        lambda x, a, b: norm(dense(F.gelu(dense(x, a, b)), a, b)),
    ),
    "kron_qkv": (
        lambda x, a, b: torch.cat(kron_qkv(x, [a, a.mT], [b, b]), -1),
        lambda x, a, b: torch.cat([dense(x, a, b), dense(x, a.mT, b)], -1),
    ),
    "kron_embedding": (
        lambda x, a, b: kron_embedding(IDS, a.view(1, 4, 2), b[:1, :1], norm_weight=x[0], norm_bias=x[1]),
        lambda x, a, b: F.layer_norm(
            F.embedding(IDS, kron_weight(a.view(1, 4, 2), b[:1, :1])), (N,), x[0], x[1], 1e-12
        ),
    ),
    "frozen_linear_kron": (
        lambda x, a, b: frozen_linear_kron(x, WEIGHT, VECTOR, a, b, alpha=0.5),
        lambda x, a, b: F.linear(x, WEIGHT, VECTOR) + 0.5 * dense(x, a, b),
    ),
}
NAMES = pytest.mark.parametrize("name", FUNCTIONS)


def point(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return made(TOKENS, N, seed=seed), made(2, 2, 2, seed=seed), made(2, 3, 3, seed=seed)


def both(name: str, transform: Callable[[Function], object]) -> None:
    ours, expected = (transform(function) for function in FUNCTIONS[name])
    torch.testing.assert_close(ours, expected)


@NAMES
def test_jvp_and_linearize(name: str) -> None:
    both(name, lambda f: jvp(f, point(), point(1)))
    both(name, lambda f: linearize(lambda *t: f(*t).pow(2), *point())[1](*point(1)))


@NAMES
def test_dual_level(name: str) -> None:
    def tangents(f: Function, with_grad: bool) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_(with_grad) for tensor in point()]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, point(1), strict=True)]
            y, tangent = forward_ad.unpack_dual(f(*duals))
            assert tangent is not None
            if not with_grad:
                return y, tangent
            return y, tangent, *torch.autograd.grad(tangent.square().sum(), leaves, allow_unused=True)

    for with_grad in (False, True):
        both(name, lambda f, with_grad=with_grad: tangents(f, with_grad))


@NAMES
def test_jacobians_nested_with_reverse_mode(name: str) -> None:
    both(name, lambda f: jacfwd(f, (0, 1, 2))(*point()))
    both(name, lambda f: hessian(lambda *t: f(*t).square().sum(), (0, 1))(*point()))
    both(name, lambda f: jacrev(jacfwd(lambda *t: f(*t).sin().sum(), 1), 2)(*point()))


@NAMES
def test_under_vmap(name: str) -> None:
    x, a, b = point()

    def one(f: Function) -> object:
        batch, tangents = torch.stack([x, 2 * x]), torch.stack([x.cos(), x.sin()])
        return vmap(lambda each, tangent: jvp(lambda t: f(t, a, b), (each,), (tangent,)))(batch, tangents)

    both(name, one)


def test_backward_of_a_call_made_before_the_level() -> None:
    for name in ("kron_matmul", "kron_ffn", "kron_addmm", "frozen_linear_kron", "kron_embedding"):

        def tangents(f: Function) -> list[Tensor | None]:
            leaves = [tensor.clone().requires_grad_() for tensor in point()]
            y = f(*leaves)
            with forward_ad.dual_level():
                seed = forward_ad.make_dual(torch.ones_like(y), y.detach())
                found = torch.autograd.grad(y, leaves, seed)
                return [forward_ad.unpack_dual(each).tangent for each in found]

        both(name, tangents)


def test_gradcheck_in_forward_mode() -> None:
    for name in ("kron_matmul", "kron_ffn", "kron_matmul_norm"):
        inputs = tuple(tensor.requires_grad_() for tensor in point())
        ours = FUNCTIONS[name][0]
        assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_batched_forward_grad=True)
        assert torch.autograd.gradgradcheck(ours, inputs, check_fwd_over_rev=True)


@pytest.mark.slow
def test_compiled() -> None:
    def tangent(f: Function) -> Tensor:
        return torch.compile(lambda *t: jvp(f, t[:3], t[3:])[1], backend="aot_eager")(*point(), *point(1))

    for name in ("kron_matmul", "kron_addmm", "kron_ffn", "kron_qkv"):
        torch._dynamo.reset()
        both(name, tangent)


def test_the_level_ends() -> None:
    """After a level the op runs again: no composition stays behind."""
    x, a, b = (tensor.float() for tensor in point())
    with forward_ad.dual_level():
        pass
    with torch.profiler.profile() as profile:
        kron_matmul(x, a, b)
    seen = [event.name for event in profile.events()]
    assert "kron_kernels::kron_matmul" in seen
