"""The reference against torch.kron itself, and the table's generator against what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kron_kernels.schemas import reference
from kron_kernels.testing import accuracy, shapes


def test_kron_weight_is_the_sum_of_torch_kron() -> None:
    for shape in shapes.SHAPES:
        operands = shapes.make(shapes.Case(shape, 1, terms=3), torch.float64)
        expected = sum(torch.kron(a, b) for a, b in zip(operands.a, operands.b, strict=True))
        torch.testing.assert_close(reference.kron_weight(operands.a, operands.b), expected)


@pytest.mark.parametrize("step", range(4))
def test_results_and_gradients_are_those_of_the_dense_linear(step: int) -> None:
    for case in shapes.CASES[step::4]:
        check_dense(case)


def check_dense(case: shapes.Case) -> None:
    operands = shapes.make(case, torch.float64)
    actual = reference.kron_matmul(operands.x, operands.a, operands.b, operands.bias)
    torch.testing.assert_close(actual, accuracy.forward_oracle(operands))
    actual = reference.kron_matmul_backward(operands.grad, operands.x, operands.a, operands.b)
    for name, result, expected in zip(
        ("dx", "da", "db", "dbias"), actual, accuracy.backward_oracle(operands), strict=True
    ):
        torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activation_comes_after_the_bias(name: str) -> None:
    operands = shapes.make(shapes.Case("odd", 5), torch.float64)
    y = accuracy.forward_oracle(operands)
    expected = {
        "gelu": y * 0.5 * (1 + torch.erf(y / 2**0.5)),
        "gelu_tanh": y * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
        "relu": y.clamp(min=0),
        "silu": y * torch.sigmoid(y),
    }[name]
    torch.testing.assert_close(reference.kron_matmul(operands.x, operands.a, operands.b, operands.bias, name), expected)


def test_leading_dimensions_are_kept() -> None:
    x, a, b = torch.randn(2, 3, 4, 10), torch.randn(1, 3, 5), torch.randn(1, 7, 2)
    y = reference.kron_matmul(x, a, b)
    assert y.shape == (2, 3, 4, 21)
    torch.testing.assert_close(y.flatten(0, 2), reference.kron_matmul(x.flatten(0, 2), a, b))


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_layouts_of_the_table_are_what_they_say(layout: str) -> None:
    operands = shapes.make(shapes.Case("odd-wide", 17, 2, layout))
    plain = {"contiguous": True, "misaligned": True, "transposed-factors": True}.get(layout, False)
    assert operands.x.is_contiguous() is plain
    assert operands.a.is_contiguous() is (layout not in ("transposed-factors", "expanded"))
    assert (operands.x.data_ptr() % 16 != 0) is (layout in ("misaligned", "strided-rows"))


def test_error_rule_catches_one_wrong_element() -> None:
    operands = shapes.make(shapes.Case("balanced", 17))
    oracle = accuracy.forward_oracle(operands)
    right: Tensor = reference.kron_matmul(operands.x, operands.a, operands.b, operands.bias)
    accuracy.assert_accurate(right, right, oracle)
    wrong = right.clone()
    wrong[3, 5] += 1e-5
    with pytest.raises(AssertionError, match="maximum error"):
        accuracy.assert_accurate(wrong, right, oracle)
    wrong[3, 5] = float("nan")
    with pytest.raises(AssertionError, match="maximum error"):
        accuracy.assert_accurate(wrong, right, oracle)
