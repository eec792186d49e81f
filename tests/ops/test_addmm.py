"""Products added to a tensor: accuracy over the table, gradients, in place, low-rank factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kron_kernels import kron_addmm, kron_addmm_
from kron_kernels.ops import addmm, frozen_linear_kron
from kron_kernels.schemas import reference
from kron_kernels.testing import accuracy, shapes
from tests.ops.sampling import HAS_CPU, OPS, needs_extension, sampled

ALPHA = 0.7


def added_oracle(o: shapes.Operands, alpha: float) -> Tensor:
    """``base + alpha * product`` in fp64 through the dense weight; the gradient serves as base."""
    d = o.double()
    return d.grad + alpha * d.x @ reference.kron_weight(d.a, d.b).T


@needs_extension
@sampled(shapes.CASES, step=5)
def test_accuracy(case: shapes.Case, dtype: torch.dtype, isa: str) -> None:
    o = shapes.make(case, dtype)
    same_dtype, oracle = reference.kron_addmm(o.grad, o.x, o.a, o.b, ALPHA), added_oracle(o, ALPHA)
    y = OPS.kron_addmm.default(o.grad, o.x, o.a, o.b, ALPHA)
    assert y.dtype is dtype
    assert y.is_contiguous()
    accuracy.assert_accurate(y, same_dtype, oracle)
    base = o.grad.clone(memory_format=torch.contiguous_format)
    OPS.kron_addmm_.default(base, o.x, o.a, o.b, ALPHA)
    assert torch.equal(base, y)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", ["odd", "k8-attention-small", "k21-w1-small"])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients(shape: str, backend: str, in_place: bool) -> None:
    o = shapes.make(shapes.Case(shape, 17, 2), torch.float64)
    oracle_leaves = [t.clone().requires_grad_() for t in (o.grad, o.x, o.a, o.b)]
    base, x, a, b = oracle_leaves
    weigh = torch.randn_like(o.grad)
    expected = torch.autograd.grad((weigh * (base + ALPHA * x @ reference.kron_weight(a, b).T)).sum(), oracle_leaves)
    leaves = [t.clone().requires_grad_() for t in (o.grad, o.x, o.a, o.b)]
    base, x, a, b = leaves
    if in_place:
        y = base.clone()
        assert kron_addmm_(y, x, a, b, alpha=ALPHA, backend=backend) is y or backend == "auto"
    else:
        y = kron_addmm(base, x, a, b, alpha=ALPHA, backend=backend)
    torch.testing.assert_close(torch.autograd.grad((weigh * y).sum(), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_each_gradient_alone(dtype: torch.dtype) -> None:
    for shape in ("k8-w1-small", "k21-attention-small"):  # the smaller factor on the left, and on the right
        o = shapes.make(shapes.Case(shape, 17), dtype)
        operands = (o.grad, o.x, o.a, o.b)
        leaves = [tensor.clone().requires_grad_() for tensor in operands]
        full = torch.autograd.grad(kron_addmm(*leaves, alpha=ALPHA).sum(), leaves)
        for index, expected in enumerate(full):
            one = [t.clone().requires_grad_(i == index) for i, t in enumerate(operands)]
            (alone,) = torch.autograd.grad(kron_addmm(*one, alpha=ALPHA).sum(), one[index])
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                alone, expected, rtol=0, atol=(1e-12 if dtype is torch.float64 else 0.03) * scale
            )


@pytest.mark.parametrize("low_rank", [False, True])
def test_gradcheck(low_rank: bool) -> None:
    o = shapes.make(shapes.Case("odd", 3, 1), torch.float64)
    base, x, a, b = (t.clone().requires_grad_() for t in (o.grad, o.x, o.a[0], o.b[0]))
    p, q = (torch.randn(7, 1).double().requires_grad_(), torch.randn(1, 2).double().requires_grad_())

    def added(base: Tensor, x: Tensor, a: Tensor, *right: Tensor) -> Tensor:
        return kron_addmm(base, x, a, right if low_rank else right[0], alpha=ALPHA)

    right = (p, q) if low_rank else (b,)
    assert torch.autograd.gradcheck(added, (base, x, a, *right))
    assert torch.autograd.gradgradcheck(added, (base, x, a, *right))
    assert torch.autograd.gradcheck(lambda base, *rest: kron_addmm_(base.clone(), *rest), (base, x, a, b))


def test_only_what_is_needed_gets_a_gradient() -> None:
    o = shapes.make(shapes.Case("odd", 5))
    base = o.grad.clone().requires_grad_()
    (d_base,) = torch.autograd.grad(kron_addmm(base, o.x, o.a, o.b).sum(), base)
    assert torch.equal(d_base, torch.ones_like(base))
    x = o.x.clone().requires_grad_()
    y = kron_addmm_(o.grad.clone(), x, o.a, o.b)
    assert y.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], reference.kron_matmul_backward(torch.ones_like(y), o.x, o.a, o.b)[0]
    )


@pytest.mark.parametrize(
    "make_base",
    [lambda t: t.clone(), shapes._columns, lambda t: t.T.contiguous().T],
    ids=["contiguous", "strided-rows", "transposed"],
)
def test_in_place_writes_any_strides(make_base: Callable[[Tensor], Tensor]) -> None:
    o = shapes.make(shapes.Case("odd", 6))
    base = make_base(o.grad)
    at = base.data_ptr()
    y = kron_addmm_(base, o.x, o.a, o.b, alpha=ALPHA)
    assert y.data_ptr() == at
    torch.testing.assert_close(base, reference.kron_addmm(o.grad, o.x, o.a, o.b, ALPHA))


@pytest.mark.parametrize("offset", [0, 9])
def test_in_place_into_its_own_input(offset: int) -> None:
    """x and base in one memory: the product is of x as it was."""
    o = shapes.make_operands(((3, 3), (3, 3)), 40)
    memory = torch.cat([o.x.flatten(), o.x.flatten()[:offset]])
    x, base = memory[: o.x.numel()].view(40, 9), memory[offset:].view(40, 9)
    expected = reference.kron_addmm(base.clone(), x.clone(), o.a, o.b)
    torch.testing.assert_close(kron_addmm_(base, x, o.a, o.b), expected)


def test_a_backward_that_needs_what_was_overwritten_fails() -> None:
    o = shapes.make(shapes.Case("odd", 6))
    base = o.grad.clone()
    needs_base = (torch.ones_like(base, requires_grad=True) * base).sum()
    kron_addmm_(base, o.x, o.a, o.b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_base.backward()
    with torch.inference_mode():
        torch.testing.assert_close(kron_addmm_(o.grad.clone(), o.x, o.a, o.b), base)


def test_fake_tensors() -> None:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        base = torch.zeros(4, 21)
        assert kron_addmm_(base, torch.zeros(4, 10), torch.zeros(3, 5), torch.zeros(7, 2)) is base


def test_in_place_makes_nothing_of_the_results_size() -> None:
    o = shapes.make_operands(((8, 8), (12, 12)), 500)
    base = o.grad.clone()
    given = {tensor.untyped_storage().data_ptr() for tensor in (base, o.x)}
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                sizes.append(out.numel())
            return out

    with Watch():
        kron_addmm_(base, o.x, o.a, (o.b[0][:, :2].contiguous(), o.b[0][:2].contiguous()), alpha=2.0)
    assert max(sizes, default=0) <= 500 * 8 * 2
    assert sizes or not HAS_CPU.available


@pytest.mark.parametrize(("rank", "folded"), [(2, True), (30, False)])
@pytest.mark.parametrize("terms", [None, 1])
def test_low_rank_factor(rank: int, folded: bool, terms: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded into the input where that is cheaper; the result is that of the factor itself."""
    o = shapes.make_operands(((4, 4), (40, 40)), 11)
    a = o.a if terms else o.a[0]
    p, q = torch.randn(40, rank), torch.randn(rank, 40)
    widths: list[int] = []
    op = addmm.addmm_op
    monkeypatch.setattr(addmm, "addmm_op", lambda base, x, *rest: widths.append(x.shape[-1]) or op(base, x, *rest))
    y = kron_addmm(o.grad, o.x, a, (p, q), alpha=ALPHA, backend="auto")
    oracle = reference.kron_addmm(o.grad.double(), o.x.double(), o.a.double(), (p.double() @ q.double())[None], ALPHA)
    torch.testing.assert_close(y.double(), oracle, rtol=1e-4, atol=1e-4)
    assert widths == ([4 * rank] if folded else [160]) or not HAS_CPU.available


def test_transforms() -> None:
    o = shapes.make_operands(((3, 5), (7, 2)), 6, bias=False)
    batch = torch.randn(4, *o.x.shape)
    expected = torch.stack([reference.kron_addmm(o.grad, x, o.a, o.b) for x in batch])
    torch.testing.assert_close(torch.vmap(lambda x: kron_addmm(o.grad, x, o.a, o.b))(batch), expected)
    factors = torch.randn(4, *o.a.shape)
    expected = torch.stack([reference.kron_addmm(o.grad, o.x, a, o.b) for a in factors])
    torch.testing.assert_close(torch.vmap(lambda a: kron_addmm(o.grad, o.x, a, o.b))(factors), expected)
    by_func = torch.func.grad(lambda x: kron_addmm_(o.grad.clone(), x, o.a, o.b).square().sum())(o.x)
    x = o.x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(reference.kron_addmm(o.grad, x, o.a, o.b).square().sum(), x)
    torch.testing.assert_close(by_func, by_autograd)


def test_autocast() -> None:
    o = shapes.make(shapes.Case("odd", 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = kron_addmm(o.grad, o.x, o.a, o.b)
        base = o.grad.bfloat16()
        kron_addmm_(base, o.x, o.a, (o.b[0][:, :1], o.b[0][:1]))
        with pytest.raises(TypeError, match=r"base: expected the dtype of x, torch.bfloat16, got torch.float32"):
            kron_addmm_(o.grad.clone(), o.x, o.a, o.b)
    assert y.dtype is base.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), reference.kron_addmm(o.grad, o.x, o.a, o.b), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("alpha", [1 / 64, -0.3])
@pytest.mark.parametrize("low_rank", [False, True], ids=["full", "low-rank"])
@pytest.mark.parametrize("frozen", [False, True], ids=["kron_addmm", "frozen_linear_kron"])
def test_half_precision_gradients_do_not_overflow_before_alpha(alpha: float, low_rank: bool, frozen: bool) -> None:
    x = torch.rand(4096, 36) * 8 + 8
    a, p, q, weight = torch.randn(6, 6), torch.randn(6, 2 if low_rank else 6), torch.randn(2, 6), torch.randn(36, 36)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.half().to(dtype).requires_grad_() for tensor in (x, a, p)]
        right = (leaves[2], q.half().to(dtype)) if low_rank else leaves[2]
        if frozen:
            y = frozen_linear_kron(leaves[0], weight.half().to(dtype), None, leaves[1], right, alpha=alpha)
        else:
            y = kron_addmm(torch.zeros_like(leaves[0]), leaves[0], leaves[1], right, alpha=alpha)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    for gradient, oracle in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (gradient - oracle).abs().max() < 3e-3 * oracle.abs().max()


def test_a_base_that_is_a_negated_view() -> None:
    o = shapes.make(shapes.Case("odd", 5))
    storage = o.grad.clone()
    base = torch._neg_view(storage)
    expected = kron_addmm(-o.grad, o.x, o.a, o.b)
    assert kron_addmm_(base, o.x, o.a, o.b) is base
    torch.testing.assert_close(base.resolve_neg(), expected)
    torch.testing.assert_close(storage, -expected)
