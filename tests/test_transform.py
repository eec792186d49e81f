"""Products rounded to int8 as they leave the kernel: the shared table, rounding, transforms, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from kron_kernels import _backends, _fused_ops, kron_matmul_int8, reference

HAS_CPU = _backends.available()["cpu"]
needs_extension = pytest.mark.skipif(not HAS_CPU.available, reason=HAS_CPU.reason)
BACKENDS = [pytest.param("cpu", marks=needs_extension), "reference"]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@needs_extension
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_op(case: cases.Case, dtype: torch.dtype, isa: str) -> None:
    o = cases.make(case, dtype)
    oracle = cases.forward_oracle(cases.Operands(o.x, o.a, o.b, None, o.grad))
    cases.assert_rounded(*_fused_ops.kron_mm_int8(o.x, o.a, o.b), reference.kron_mm(o.x, o.a, o.b), oracle)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short)
@pytest.mark.parametrize("case", cases.CASES[::5], ids=lambda case: case.id)
def test_reference(case: cases.Case, dtype: torch.dtype) -> None:
    o = cases.make(case, dtype)
    oracle = cases.forward_oracle(cases.Operands(o.x, o.a, o.b, None, o.grad))
    q, scale = kron_matmul_int8(o.x, o.a, o.b, backend="reference")
    cases.assert_rounded(q, scale, reference.kron_mm(o.x, o.a, o.b), oracle)


@needs_extension
@pytest.mark.parametrize("shape", ["odd", "k8-w1-small", "k8-attention-small", "balanced", "odd-wide"])
def test_bytes_are_those_of_the_exact_result_but_next_to_a_tie(shape: str, isa: str) -> None:
    o = cases.make(cases.Case(shape, 33, bias=False), torch.float32)
    q, _ = _fused_ops.kron_mm_int8(o.x, o.a, o.b)
    exact, scale = cases.forward_oracle(o), cases.forward_oracle(o).abs().amax(-1, keepdim=True) / 127
    steps = exact / scale
    differs = q.double() != steps.round()
    assert (q.double() - steps.round()).abs().max() <= 1
    assert ((steps[differs] - steps[differs].floor() - 0.5).abs() < 1e-3).all()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_even_and_special_tokens(backend: str, dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    tokens = {
        (127, 0.5, 1.5, -2.5, -0.5, 126, -127): (1, (127, 0, 2, -2, 0, 126, -127)),
        (-127, 63.5, 64.5, -63.5, 3.5, 0, -1): (1, (-127, 64, 64, -64, 4, 0, -1)),
        (0, 0, -0.0, 0, 0, 0, 0): (0, (0,) * 7),
        (1, 2, nan, 4, 0, 0, 0): (nan, (0,) * 7),
        (1, 2, -inf, 4, 0, 0, 0): (inf, (0,) * 7),
        (1, inf, nan, 4, 0, 0, 0): (nan, (0,) * 7),
    }
    # Identity factors. 0 times infinity is NaN there: what infinity does to a scale is tested without a product.
    x = torch.tensor(list(tokens), dtype=dtype)
    one, eye = torch.ones(1, 1, dtype=dtype), torch.eye(7, dtype=dtype)
    finite = x.isfinite().all(-1)
    q, scale = kron_matmul_int8(x, one, eye, backend=backend)
    expected_scale = torch.tensor([scale for scale, _ in tokens.values()])[:, None]
    expected_q = torch.tensor([bytes_ for _, bytes_ in tokens.values()], dtype=torch.int8)
    assert torch.equal(q, expected_q)
    torch.testing.assert_close(scale[finite], expected_scale[finite], rtol=0, atol=0)
    assert (q[~finite] * scale[~finite]).isnan().all()
    q, scale = reference.quantize_tokens(x)
    assert torch.equal(q, expected_q)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_that_float32_does_not_hold(backend: str) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    q, scale = kron_matmul_int8(
        torch.tensor([[1e60], [1e-60], [2.49e-43]], dtype=torch.float64), one, one, backend=backend
    )
    assert scale.flatten().tolist()[:2] == [float("inf"), 0]
    assert q.flatten().tolist() == [0, 0, 127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(tokens: int, dtype: torch.dtype) -> None:
    o = cases.make(cases.Case("odd", tokens, 2), dtype)
    torch.library.opcheck(_fused_ops.kron_mm_int8, (o.x, o.a, o.b))
    torch.library.opcheck(_fused_ops.kron_mm_int8, (o.x, o.a[0], o.b[0]))


def test_leading_dimensions_and_matrices() -> None:
    o = cases.make(cases.Case("odd", 24, bias=False))
    flat = kron_matmul_int8(o.x, o.a, o.b)
    for view, back in (
        (o.x.view(4, 6, -1), lambda t: t.flatten(0, 1)),
        (o.x.view(4, 6, -1).mT.contiguous().mT, lambda t: t.flatten(0, 1)),
        (o.x.view(6, 4, -1).transpose(0, 1), lambda t: t.transpose(0, 1).flatten(0, 1)),
    ):
        for one, other in zip(kron_matmul_int8(view, o.a[0], o.b[0]), flat, strict=True):
            assert torch.equal(back(one), other)
    q, scale = kron_matmul_int8(o.x[0], o.a, o.b)
    assert (q.shape, scale.shape) == ((21,), (1,))


def test_vmap_over_tokens_and_over_factors() -> None:
    o = cases.make(cases.Case("odd", 24, 3, bias=False))
    x = o.x.view(3, 8, -1)
    for in_dims, each in (((0, None, None), (o.a, o.b)), ((0, 0, 0), (o.a[:, None], o.b[:, None]))):
        mapped = torch.vmap(kron_matmul_int8, in_dims)(x, *each)
        factors = [each if in_dims[1] is None else (each[0][i], each[1][i]) for i in range(3)]
        single = [kron_matmul_int8(x[i], *factors[i]) for i in range(3)]
        for one, many in zip(mapped, zip(*single, strict=True), strict=True):
            assert torch.equal(one, torch.stack(many))


@pytest.mark.compile
def test_compile_gives_the_same_bytes() -> None:
    o = cases.make(cases.Case("balanced", 5, bias=False))
    compiled = torch.compile(kron_matmul_int8, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(o.x, o.a, o.b), kron_matmul_int8(o.x, o.a, o.b), strict=True):
        assert torch.equal(one, other)


def test_autocast_casts_as_for_a_linear_layer() -> None:
    o = cases.make(cases.Case("odd", 5, bias=False))
    half = [tensor.bfloat16() for tensor in (o.x, o.a, o.b)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = kron_matmul_int8(o.x, o.a, o.b)
    for one, other in zip(inside, kron_matmul_int8(*half), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("name", ["x", "a", "b"])
def test_gradients_are_refused(name: str, backend: str | None) -> None:
    o = cases.make(cases.Case("odd", 5))
    operands = {key: getattr(o, key).clone().requires_grad_(key == name) for key in ("x", "a", "b")}
    message = f"{name}: expected a tensor that needs no gradient, .* got one with requires_grad"
    with pytest.raises(ValueError, match=message):
        kron_matmul_int8(**operands, backend=backend)
    with pytest.raises(ValueError, match=message):
        kron_matmul_int8(**{key: tensor.double() for key, tensor in operands.items()}, backend=backend)
    with torch.no_grad():
        q, scale = kron_matmul_int8(**operands, backend=backend)
    assert not q.requires_grad
    assert not scale.requires_grad


def test_gradients_of_torch_func_are_refused() -> None:
    o = cases.make(cases.Case("odd", 5))

    def scale_sum(x: Tensor) -> Tensor:
        return kron_matmul_int8(x, o.a, o.b)[1].sum()

    with pytest.raises(ValueError, match="x: expected a tensor that needs no gradient"):
        torch.func.grad(scale_sum)(o.x)
    with pytest.raises(ValueError, match="x: expected a tensor that needs no gradient"):
        torch.func.grad(lambda x: torch.vmap(scale_sum)(x[:, None]).sum())(o.x)


BAD: list[tuple[Callable[..., Any], type[Exception], str]] = [
    (lambda x, a, b: (None, a, b), TypeError, "x: expected a Tensor, got NoneType"),
    (lambda x, a, b: (x[:, 1:], a, b), ValueError, r"x: expected last dimension n1 \* n2 = 5 \* 2 = 10"),
    (lambda x, a, b: (x, a.double(), b), TypeError, "a: expected the dtype of x, torch.float32, got torch.float64"),
    (lambda x, a, b: (x, a, b[:1]), ValueError, "b: expected as many terms S as a, 2, got 1"),
    (lambda x, a, b: (x, a[:, :, :0], b), ValueError, "a: expected a matrix or a stack of them"),
    (lambda x, a, b: (x.int(), a.int(), b.int()), TypeError, "x: expected dtype float32, float64, bfloat16 or float16"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:20] for _, _, message in BAD])
def test_bad_input(change: Callable[..., Any], error: type[Exception], message: str, backend: str | None) -> None:
    o = cases.make(cases.Case("odd", 5, 2))
    with pytest.raises(error, match=message):
        kron_matmul_int8(*change(o.x, o.a, o.b), backend=backend)


def test_unknown_backend() -> None:
    o = cases.make(cases.Case("odd", 5))
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'gpu'"):
        kron_matmul_int8(o.x, o.a, o.b, backend="gpu")


@needs_extension
def test_threads_change_nothing() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for shape, tokens in (("balanced", 257), ("k8-attention", 3), ("k8-w1-small", 33)):
                o = cases.make(cases.Case(shape, tokens))
                results.append(_fused_ops.kron_mm_int8(o.x, o.a, o.b))
    finally:
        torch.set_num_threads(before)
    for (q1, scale1), (q2, scale2) in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(scale1, scale2, rtol=1e-5, atol=0)
        assert (q1.int() - q2.int()).abs().max() <= 1
