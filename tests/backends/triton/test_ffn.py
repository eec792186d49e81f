"""The feed-forward block in Triton, in each of its forms, and its gradients, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.backends.triton import ffn, implementations
from kron_kernels.backends.triton.ffn_tiles import FfnTiles
from kron_kernels.backends.triton.tiles import Tiles
from kron_kernels.schemas import reference
from kron_kernels.testing.accuracy import assert_accurate
from kron_kernels.testing.shapes import LAYOUTS
from tests.ops.block_cases import FFN_SHAPES, FfnCase, ffn_case, ffn_gradients

OPS = implementations()
# Tokens of one tile and one more, or 0 and 1; activations; layouts, on sizes with edges everywhere.
SAMPLE = (
    *(FfnCase(shape, 17, norm=True) for shape in ("k8", "k21", "one-row", "three")),
    *(FfnCase("odd", tokens, activation=name) for tokens, name in ((0, None), (1, "relu"), (17, "silu"))),
    *(FfnCase("odd", 17, 1, layout, "gelu_tanh") for layout in LAYOUTS[1:]),
)


def code(case: FfnCase) -> int:
    return [None, *reference.ACTIVATIONS].index(case.activation)


def check(case: FfnCase, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = ffn_case(case, dtype)
    norm = o.norm if case.norm else (None, None, None, 0.0)
    assert_accurate(OPS["kron_ffn"](*o.layers, code(case), *norm), same_dtype, oracle)


def check_gradients(case: FfnCase, dtype: torch.dtype, needs: int = 127) -> None:
    o, _, _ = ffn_case(case, dtype)
    found = OPS["kron_ffn_backward"](o.grad, *o.layers[:-1], code(case), needs)
    for bit, values in enumerate(zip(found, *ffn_gradients(case, dtype), strict=True)):
        if needs >> bit & 1:
            assert_accurate(*values, f"gradient {bit}")
        else:
            assert values[0].shape == (0,)


@pytest.mark.quick
def test_smoke() -> None:
    check(FfnCase("odd", 3, norm=True), torch.float32)
    check_gradients(FfnCase("odd", 3), torch.float32)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.id)
@pytest.mark.parametrize("kernels", [1, 2])
def test_fused_forms(case: FfnCase, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form in small tiles, so that tokens and columns have edges."""
    monkeypatch.setattr(ffn, "is_one_kernel", lambda *_: kernels == 1)
    monkeypatch.setattr(ffn, "tiles_of", lambda *_: FfnTiles(16, 16, 4, 2))
    monkeypatch.setattr(ffn, "z_tiles", lambda *_: Tiles(16, 16, 16, 4, 2))
    monkeypatch.setattr(ffn, "row_tiles", lambda *_: Tiles(16, 16, 16, 4, 2))
    for dtype in (torch.float32, torch.float16) if case.layout == "contiguous" else (torch.float32,):
        check(case, dtype)


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("shape", FFN_SHAPES)
def test_the_form_that_is_chosen(shape: str, terms: int) -> None:
    check(FfnCase(shape, 17, terms, norm=True), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*SAMPLE[:8], FfnCase("tiny-right", 17, 2)], ids=lambda case: case.id)
def test_gradients(case: FfnCase, dtype: torch.dtype) -> None:
    check_gradients(case, dtype)


@pytest.mark.parametrize("needs", [0, *(1 << bit for bit in range(7)), 0b0100001])
@pytest.mark.parametrize("shape", ["odd", "tiny-right"])
def test_only_the_gradients_needed(shape: str, needs: int) -> None:
    check_gradients(FfnCase(shape, 5), torch.float32, needs)
