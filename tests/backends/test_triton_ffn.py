"""The feed-forward block in Triton, interpreted: one kernel, two kernels and two products, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from kron_kernels.schemas import reference
from kron_kernels.schemas.ffn import FFN_GRADIENTS
from kron_kernels.schemas.product import Product
from kron_kernels.schemas.registry import ACTIVATION_CODES
from tests import cases
from tests.ops import block_cases
from tests.ops.block_cases import FfnCase

pytest.importorskip("triton")

from kron_kernels.backends.triton.ffn_plan import FfnTiles, RowTiles, ZTiles
from kron_kernels.backends.triton.plan import Device

from kron_kernels.backends.triton import ffn, ffn_backward, ffn_plan
from kron_kernels.backends.triton.launch import INTERPRETED, recording

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here: the tests of the GPU run them")

CHAINED = ("k8", "k21", "one-row", "odd", "three")
# Tokens of 0, 1 and a tile and one more; every activation; every layout, on sizes with edges everywhere.
LISTED = [
    *(FfnCase(shape, tokens, norm=tokens == 17) for shape in CHAINED for tokens in (0, 1, 17)),
    *(FfnCase("odd", 17, activation=name) for name in (None, *reference.ACTIVATIONS)),
    *(FfnCase("odd", 17, 1, layout) for layout in cases.LAYOUTS[1:]),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = [FfnCase("k8", 33, norm=True), FfnCase("odd", 17), FfnCase("odd", 17, activation="gelu_tanh")]
ALL_FORMS = [FfnCase(shape, 17, terms, norm=True) for shape in block_cases.FFN_SHAPES for terms in (1, 2)]


@pytest.fixture(params=(1, 2), ids=("one-kernel", "two-kernels"))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each form in small tiles, so that tokens and columns have edges."""
    for name, value in (
        ("is_one_kernel", request.param == 1),
        ("tiles_of", FfnTiles(16, 16, 4, 2)),
        ("z_tiles", ZTiles(16, 16, 16, 4, 2)),
        ("row_tiles", RowTiles(16, 16, 16, 4, 2)),
    ):
        monkeypatch.setattr(ffn, name, lambda *_, value=value: value)
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


def test_gradients_summed_over_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn_backward, "_PROGRAMS", 0)
    _check_gradients(FfnCase("odd", 17), torch.float32)


DEVICES = (Device(80, 108, 163 * 1024), Device(90, 132, 227 * 1024), Device("gfx942", 304, 64 * 1024))
# Of a first pair A (m1, n1), B (m2, n2), and A, B of the second.
SIZES = {
    "k8": ((8, 2), (384, 384), (2, 8), (384, 384)),
    "k21": ((16, 2), (192, 384), (2, 16), (384, 192)),
    "gpt-2": ((4, 1), (768, 768), (1, 4), (768, 768)),
    "small": ((4, 2), (64, 48), (2, 4), (48, 64)),
    "unchained": ((8, 2), (384, 384), (2, 16), (384, 192)),
    "tiny-right": ((384, 384), (8, 2), (384, 384), (2, 8)),
}
FORMS = {
    None: {"ffn_forward_kernel"},
    "two kernels": {"ffn_middle_kernel", "ffn_rows_kernel"},
    "two products": {"mm_kernel"},
}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: str(device.arch))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_fits_says_what_runs(name: str, dtype: torch.dtype, device: Device) -> None:
    factors = [torch.empty(1, *size, dtype=dtype, device="meta") for size in SIZES[name]]
    a1, b1, a2, b2 = factors
    x = torch.empty(40, a1.shape[2] * b1.shape[2], dtype=dtype, device="meta")
    with recording(device) as launches:
        ffn.kron_ffn(x, a1, b1, None, a2, b2, None, 1, None, None, None, 0.0)
    reason = ffn_plan.fits(Product.of(a1, b1), Product.of(a2, b2), 40, dtype, device)
    form = None if reason is None else " ".join(reason.split()[:2]).rstrip(":")
    assert {launch.kernel.fn.__name__ for launch in launches} == FORMS[form]


def test_which_blocks_run_as_one_kernel() -> None:
    def reason(name: str, dtype: torch.dtype, device: Device) -> str | None:
        (m1, n1), (m2, n2), (p1, q1), (p2, q2) = SIZES[name]
        return ffn_plan.fits(Product(1, m1, n1, m2, n2), Product(1, p1, q1, p2, q2), 4096, dtype, device)

    assert all(reason("k8", dtype, device) is None for dtype in DTYPES[1:] for device in DEVICES[:2])
    assert "cannot hold" in str(reason("k8", torch.float32, DEVICES[1]))
    assert "cannot hold" in str(reason("k21", torch.bfloat16, DEVICES[1]))
    assert "grid of 8x384, the second takes one of 16x192" in str(reason("unchained", torch.bfloat16, DEVICES[1]))
    assert "too large to be mixed in" in str(reason("tiny-right", torch.bfloat16, DEVICES[1]))
