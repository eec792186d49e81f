"""The feed-forward block in Triton, interpreted: one kernel, two kernels and two products, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import block_cases
import cases
from block_cases import FfnCase
from kron_kernels import reference
from kron_kernels._fused_ops import FFN_GRADIENTS
from kron_kernels._ops import ACTIVATION_CODES

pytest.importorskip("triton")

from kron_kernels.triton import ffn, ffn_backward, ffn_plan
from kron_kernels.triton.ffn_plan import Ffn, FfnTiles
from kron_kernels.triton.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here: the tests of the GPU run them")

CHAINED = ("k8", "k21", "one-row", "odd")
# Tokens of 0, 1 and a tile and one more; every activation; every layout, on sizes with edges everywhere.
LISTED = [
    *(FfnCase(shape, tokens, norm=tokens == 17) for shape in CHAINED for tokens in (0, 1, 17)),
    *(FfnCase("odd", 17, activation=name) for name in (None, *reference.ACTIVATIONS)),
    *(FfnCase("odd", 17, 1, layout) for layout in cases.LAYOUTS[1:]),
]
HALF = [FfnCase("k8", 33, norm=True), FfnCase("odd", 17), FfnCase("odd", 17, activation="gelu_tanh")]
ALL_FORMS = [FfnCase(shape, 17, terms, norm=True) for shape in block_cases.FFN_SHAPES for terms in (1, 2)]


@pytest.fixture(params=(1, 2), ids=("one-kernel", "two-kernels"))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Each form in small tiles, so that tokens and columns have edges."""

    def tiles(ffn: Ffn, *_: object) -> FfnTiles:
        depth = ffn_plan.held_block(ffn.k) if request.param == 1 else 16
        return FfnTiles(request.param, 16, 16, depth, 4, 2)

    monkeypatch.setattr("kron_kernels.triton.ffn.tiles_of", tiles)
    return request.param


def _check(case: FfnCase, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = block_cases.ffn_case(case, dtype)
    norm = o.norm if case.norm else (None, None, None, 0.0)
    cases.assert_accurate(ffn.kron_ffn(*o.layers, ACTIVATION_CODES[case.activation], *norm), same_dtype, oracle)


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.id)
def test_forms_in_float32(case: FfnCase, kernels: int) -> None:
    _check(case, torch.float32)


@pytest.mark.parametrize("case", HALF, ids=lambda case: case.id)
def test_forms_in_float16(case: FfnCase, kernels: int) -> None:
    _check(case, torch.float16)


@pytest.mark.parametrize("case", ALL_FORMS, ids=lambda case: case.id)
def test_form_of_the_plan(case: FfnCase) -> None:
    _check(case, torch.float16)


def _check_gradients(case: FfnCase, dtype: torch.dtype, needs: int = 0b1111111) -> None:
    o, _, _ = block_cases.ffn_case(case, dtype)
    same_dtype, oracle = block_cases.ffn_gradients(case, dtype)
    operands = (o.grad, o.x, o.a1, o.b1, o.bias1, o.a2, o.b2)
    found = ffn_backward.kron_ffn_backward(*operands, ACTIVATION_CODES[case.activation], needs)
    for bit, (name, actual) in enumerate(zip(FFN_GRADIENTS, found, strict=True)):
        if needs >> bit & 1:
            cases.assert_accurate(actual, same_dtype[bit], oracle[bit], f"gradient of {name}")
        else:
            assert actual.shape == (0,)


@pytest.mark.parametrize("case", LISTED, ids=lambda case: case.id)
def test_gradients_in_float32(case: FfnCase) -> None:
    _check_gradients(case, torch.float32)


@pytest.mark.parametrize("case", [*HALF, FfnCase("tiny-right", 17, 2)], ids=lambda case: case.id)
def test_gradients_in_float16(case: FfnCase) -> None:
    _check_gradients(case, torch.float16)


@pytest.mark.parametrize("needs", [0, *(1 << bit for bit in range(7)), 0b0100001, 0b0011010])
@pytest.mark.parametrize("shape", ["odd", "tiny-right"])
def test_gradients_that_are_asked_for(shape: str, needs: int) -> None:
    _check_gradients(FfnCase(shape, 17), torch.float32, needs)
