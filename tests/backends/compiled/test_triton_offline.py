"""Compiling recorded launches without a GPU, and what is read from the result."""

from __future__ import annotations

import pytest
import torch
from kron_kernels.backends.triton.offline import DEVICES, compile_all, compile_launch, key

from kron_kernels.backends.triton import launch, offline
from tests.backends.triton_matmul import matmul


def record(*sizes: int, target: str = "sm_90", dtype: torch.dtype = torch.bfloat16, **options: int) -> launch.Launch:
    """The launch of a product of ``x (T, n)`` and ``w (m, n)`` for sizes T, n, m."""
    tokens, n, m = sizes
    with launch.recording(DEVICES[target]) as launches:
        matmul(
            torch.empty(tokens, n, dtype=dtype, device="meta"), torch.empty(m, n, dtype=dtype, device="meta"), **options
        )
    return launches[0]


def test_a_product_becomes_wgmma_on_hopper() -> None:
    report = compile_launch(record(300, 128, 64), "sm_90")
    assert report.wgmma > 0
    assert report.mma == 0
    assert report.stack == report.local == 0
    assert 0 < report.registers < 255
    # Three stages of x and w tiles of 64 x 64 values.
    assert 2 * 3 * 2 * 64 * 64 <= report.shared <= DEVICES["sm_90"].shared
    # 64 x 64 results of 2 bytes, over 128 threads.
    assert sum(size * count for size, count in report.stores.items()) == 64 * 64 * 2 / 128
    assert list(report.stores) == [16]


@pytest.mark.parametrize(
    ("target", "kind"), [("sm_80", "mma"), ("sm_89", "mma"), ("sm_100", "wgmma"), ("gfx942", "mma")]
)
def test_other_chips(target: str, kind: str) -> None:
    report = compile_launch(record(300, 128, 64, target=target), target)
    assert getattr(report, kind) > 0
    assert getattr(report, {"mma": "wgmma", "wgmma": "mma"}[kind]) == 0
    assert report.stack == report.local == 0
    assert sum(report.stores.values()) > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_tile_too_large_for_the_registers_spills(target: str) -> None:
    # 128 x 128 float32 sums over 32 (64) threads of at most 255 (512) registers.
    report = compile_launch(record(300, 128, 128, target=target, tile=128, warps=1), target)
    assert report.stack > 0
    assert report.local > 0


def test_a_chip_that_has_no_name() -> None:
    assert compile_launch(record(300, 128, 64), launch.Device(86, 84, 99 * 1024)).mma > 0


def test_misaligned_tensors_are_compiled_as_such() -> None:
    x = torch.empty(300 * 128 + 1, dtype=torch.bfloat16)[1:].view(300, 128)
    with launch.recording(DEVICES["sm_80"]) as launches:
        matmul(x, torch.empty(64, 128, dtype=torch.bfloat16))
    aligned = record(300, 128, 64)
    assert key(launches[0]) != key(aligned)
    signature, constants, attributes = offline._specialise(launches[0], amd=False)
    assert signature["x"] == "*bf16"
    assert (0,) not in attributes
    assert (1,) in attributes
    assert constants["BT"] == 64


def test_integers_are_specialised_as_triton_does() -> None:
    signature, constants, attributes = offline._specialise(record(1, 1, 16), amd=False)
    assert signature["T"] == "i32"  # never specialised on
    assert "T" not in constants
    assert (signature["N"], constants["N"]) == ("constexpr", 1)
    assert signature["scale"] == "fp32"
    assert attributes[(0,)] == [["tt.divisibility", 16]]
    assert (3,) not in offline._specialise(record(32, 64, 16), amd=False)[2]
    assert offline._specialise(record(32, 64, 16), amd=False)[2][(4,)] == [["tt.divisibility", 16]]
    assert (4,) not in offline._specialise(record(32, 72, 16), amd=False)[2]
    assert offline._specialise(record(2**31, 64, 16), amd=False)[0]["T"] == "i64"


def test_the_rules_are_those_of_tritons_own_launches() -> None:
    launched = record(32, 72, 16)
    kernel = launched.kernel
    backend = offline.triton.compiler.make_backend(offline._gpu_target(DEVICES["sm_90"]))
    from triton.runtime.jit import create_function_from_signature

    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, kinds, _ = bind(*launched.arguments, *launched.constants)
    signature, _, attributes = offline._specialise(launched, amd=False)
    assert list(signature.values()) == [kind for kind, _ in kinds]
    for index, (_, value) in enumerate(kinds[: len(launched.arguments)]):
        assert attributes.get((index,), []) == backend.parse_attr(value or "")


def test_many_at_once_keep_their_order_and_errors() -> None:
    good, wrong = record(300, 128, 64), record(300, 128, 64, tile=48)  # arange wants a power of two
    first, second, third = compile_all([(good, "sm_90"), (wrong, "sm_90"), (good, "sm_80")], 2)
    assert isinstance(first, offline.Report)
    assert first.wgmma > 0
    assert isinstance(second, RuntimeError)
    assert "matmul_kernel(BT=48, BM=64, BK=64) with 4 warps and 3 stages does not compile for sm_90" in str(second)
    assert isinstance(third, offline.Report)
    assert third.mma > 0


def test_errors() -> None:
    launched = record(300, 128, 64)
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        compile_launch(launched, "sm_70")
    with pytest.raises(ValueError, match="matmul_kernel: expected 9 parameters, got 5 arguments and 3 constants"):
        compile_launch(launched._replace(arguments=launched.arguments[1:]), "sm_80")
