"""kron_ffn and its gradients: accuracy, every order of derivative, autocast, special values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kron_kernels import AddNorm, kron_ffn
from kron_kernels.schemas import reference
from kron_kernels.schemas.ffn import FFN_GRADIENTS
from kron_kernels.schemas.registry import ACTIVATION_CODES, needed
from kron_kernels.testing import accuracy
from tests.ops import block_cases
from tests.ops.block_cases import FFN_CASES, FFN_SHAPES, FfnCase, make_ffn
from tests.ops.sampling import BACKENDS, HAS_CPU, OPS, needs_extension, sampled


def run(o: block_cases.Ffn, case: FfnCase) -> Tensor:
    norm: tuple[Any, ...] = o.norm if case.norm else (None, None, None, 0.0)
    return OPS.kron_ffn(*o.layers, ACTIVATION_CODES[case.activation], *norm)


def small_leaves() -> tuple[Tensor, ...]:
    """x (2, 6), and a pair (4, 2) (x) (3, 3), then (2, 4) (x) (2, 3): small enough for finite differences."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 6), (1, 4, 2), (1, 3, 3), (12,), (1, 2, 4), (1, 2, 3), (4,))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes)


@needs_extension
@sampled(FFN_CASES, step=3)
def test_accuracy(case: FfnCase, dtype: torch.dtype, isa: str) -> None:
    o, same_dtype, oracle = block_cases.ffn_case(case, dtype)
    y = run(o, case)
    assert y.dtype is dtype
    assert y.is_contiguous()
    accuracy.assert_accurate(y, same_dtype, oracle)
    same_dtypes, oracles = block_cases.ffn_gradients(case, dtype)
    actual = OPS.kron_ffn_backward(o.grad, *o.layers[:6], ACTIVATION_CODES[case.activation], 0b1111111)
    for name, *three in zip(FFN_GRADIENTS, actual, same_dtypes, oracles, strict=True):
        accuracy.assert_accurate(*three, name)


@needs_extension
def test_gradients_in_several_blocks_of_tokens() -> None:
    """1500 rows of 3072 values: three blocks of 8 MB."""
    o = make_ffn(FfnCase("balanced", 1500), torch.float32)
    o = block_cases.Ffn(**{**vars(o), "grad": o.grad / 30})
    exact = block_cases.double(o)
    same_dtype = reference.kron_ffn_backward(o.grad, *o.layers[:6], "gelu")
    oracles = reference.kron_ffn_backward(exact.grad, *exact.layers[:6], "gelu")
    actual = OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, 0b1111111)
    for name, *three in zip(FFN_GRADIENTS, actual, same_dtype, oracles, strict=True):
        accuracy.assert_accurate(*three, name)


@pytest.mark.parametrize("needs", [0b0000001, 0b0001010, 0b1110000, 0b0000100, 0])
def test_backward_computes_what_is_needed(needs: int) -> None:
    o = make_ffn(FfnCase("k8", 33), torch.float32)
    everything = OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, 0b1111111)
    some = OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, needs)
    for need, gradient, full in zip(needed(needs, 7), some, everything, strict=True):
        torch.testing.assert_close(gradient, full if need else full.new_empty(0))


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_token(value: float, dtype: torch.dtype) -> None:
    for shape in FFN_SHAPES:
        o = make_ffn(FfnCase(shape, 33), dtype)
        x = o.x.clone()
        x[7, 3] = value
        y, plain = (OPS.kron_ffn(each, *o.layers[1:], 1, None, None, None, 0.0) for each in (x, o.x))
        others = torch.arange(33) != 7
        assert torch.equal(y[others], plain[others])
        exact = reference.kron_ffn(x.double(), *(tensor.double() for tensor in o.layers[1:]), "gelu")
        assert torch.equal(y[7].isfinite(), exact[7].isfinite())


@pytest.mark.parametrize("shape", list(FFN_SHAPES))
def test_two_runs_give_the_same_bits(shape: str) -> None:
    o = make_ffn(FfnCase(shape, 129), torch.float32)
    runs = [(kron_ffn(*o.layers), *OPS.kron_ffn_backward(o.grad, *o.layers[:6], 1, 0b1111111)) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
def test_is_the_two_dense_layers(backend: str | None, activation: str | None) -> None:
    o = make_ffn(FfnCase("unchained", 12), torch.float64)
    x = o.x.view(2, 6, -1)
    norm = AddNorm(o.residual.view(2, 6, -1), o.weight, o.bias, 1e-5)
    hidden = F.linear(x, reference.kron_weight(o.a1, o.b1), o.bias1)
    hidden = hidden if activation is None else reference.ACTIVATIONS[activation](hidden)
    dense = F.linear(hidden, reference.kron_weight(o.a2, o.b2), o.bias2)
    torch.testing.assert_close(kron_ffn(x, *o.layers[1:], activation=activation, backend=backend), dense)
    normed = kron_ffn(x, *o.layers[1:], activation=activation, norm=norm, backend=backend)
    torch.testing.assert_close(normed, F.layer_norm(norm.residual + dense, o.weight.shape, o.weight, o.bias, 1e-5))


def test_matrices_are_stacks_of_one_and_biases_may_miss() -> None:
    o = make_ffn(FfnCase("unchained", 3), torch.float32)
    matrices = [tensor[0] if tensor.dim() == 3 else tensor for tensor in o.layers[1:]]
    assert torch.equal(kron_ffn(o.x, *matrices), kron_ffn(o.x, *o.layers[1:]))
    x, a1, b1, bias1, a2, b2, bias2 = small_leaves()
    for biases in ((bias1, None), (None, bias2), (None, None)):
        y = kron_ffn(x, a1, b1, biases[0], a2, b2, biases[1])
        torch.testing.assert_close(y, reference.kron_ffn(x, a1, b1, biases[0], a2, b2, biases[1], "gelu"))
        assert torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_gradcheck(activation: str | None) -> None:
    torch.autograd.gradcheck(lambda *t: kron_ffn(*t, activation=activation), small_leaves())


@pytest.mark.parametrize("needs", [(0,), (1, 2), (3,), (4, 6), (5,)])
def test_gradients_of_some_inputs(needs: tuple[int, ...]) -> None:
    inputs = tuple(tensor.requires_grad_(index in needs) for index, tensor in enumerate(small_leaves()))
    torch.autograd.gradcheck(lambda *t: kron_ffn(*t), inputs)


def test_gradgradcheck() -> None:
    torch.autograd.gradgradcheck(lambda *t: kron_ffn(*t), small_leaves())


def test_second_derivatives_where_one_operand_is_computed_from_another() -> None:
    """Shared weights: what flows from one operand to another outside the block is not counted inside it too."""
    x, a1, b1, bias1, *_ = small_leaves()

    def tied(block: Any) -> tuple[Tensor, ...]:
        inputs = x * a1.sum(), a1, b1, bias1, a1.mT, b1.mT, None
        first = torch.autograd.grad(block(*inputs).square().sum(), (x, a1, b1), create_graph=True)
        return *first, *torch.autograd.grad(sum(each.square().sum() for each in first), (x, a1, b1))

    torch.testing.assert_close(tied(kron_ffn), tied(lambda *t: reference.kron_ffn(*t, "gelu")))


def test_only_the_inputs_are_kept_for_backward() -> None:
    inputs = small_leaves()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kron_ffn(*inputs)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in inputs} or not HAS_CPU.available


def test_func_grad_and_vmap() -> None:
    inputs = tuple(tensor.detach() for tensor in small_leaves())
    expected = torch.autograd.grad(reference.kron_ffn(*(leaf := small_leaves()), "gelu").sum(), leaf)
    actual = torch.func.grad(lambda *t: kron_ffn(*t).sum(), argnums=tuple(range(7)))(*inputs)
    torch.testing.assert_close(actual, expected)
    x = torch.stack([inputs[0], -inputs[0], 2 * inputs[0]])
    rows = torch.vmap(lambda x: kron_ffn(x, *inputs[1:]))(x)
    torch.testing.assert_close(rows, kron_ffn(x, *inputs[1:]))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    o = make_ffn(FfnCase("k8", 9), torch.float32)
    inputs = tuple(tensor.detach().requires_grad_(grad) for tensor in o.layers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kron_ffn(*inputs)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), kron_ffn(*inputs), rtol=0.05, atol=0.1)
    if grad:
        assert all(each.dtype is torch.float32 for each in torch.autograd.grad(y.float().sum(), inputs))


def test_no_tokens_and_no_data() -> None:
    o = make_ffn(FfnCase("unchained", 3), torch.float32)
    for shape in ((0, 24), (2, 0, 24)):
        x = torch.zeros(shape, requires_grad=True)
        y = kron_ffn(x, *(tensor.requires_grad_() for tensor in o.layers[1:]))
        assert y.shape == shape
        assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), (x, *o.layers[1:])))
        with torch.no_grad():
            assert kron_ffn(x, *o.layers[1:]).shape == shape
    y = kron_ffn(*(tensor.to("meta") for tensor in o.layers))
    assert (y.shape, y.device.type) == ((3, 24), "meta")
