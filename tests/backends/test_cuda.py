"""The CUDA kernels without a GPU: the emulator runs them on tensors of the CPU, against the fp64 oracle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kron_kernels.backends import cuda
from kron_kernels.backends.base import Call
from kron_kernels.schemas import reference
from kron_kernels.schemas.product import Product
from kron_kernels.testing import accuracy, shapes
from kron_kernels.testing.accuracy import assert_accurate
from kron_kernels.testing.shapes import LAYOUTS, Case
from tests.ops import block_cases
from tests.ops.block_cases import FfnCase

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated-binding"
HALVES = (torch.bfloat16, torch.float16)
# One tiny factor, at most 16 x 16, and few tokens: the emulator runs every thread of every block.
SAMPLE = (
    *(Case(shape, 5) for shape in ("k8-attention-small", "k8-w1-small", "k21-attention-small", "row-b", "scalar")),
    *(Case("k8-w2-small", 17, 2, layout, bias=False) for layout in LAYOUTS),
    Case("odd", 1),
    Case("column-b", 5, 2),
)


@pytest.fixture(scope="module")
def ops() -> Any:
    """The namespace of the emulated ops, built with CMake and a C++ compiler."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not (ROOT / "CMakeLists.txt").is_file() or not cmake or not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("the emulated CUDA kernels need the source tree, cmake and a C++ compiler")
    options = {
        "KRON_KERNELS_BUILD_TESTS": "ON",
        "KRON_KERNELS_CUDA": "OFF",
        "KRON_KERNELS_TORCH_DIR": str(Path(torch.__file__).parent),
        "Python_EXECUTABLE": sys.executable,
    }
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    for command in (
        [cmake, "-S", ROOT, "-B", BUILD, *(f"-D{name}={value}" for name, value in options.items())],
        [cmake, "--build", BUILD, "--target", "_C_cuda_emulated", "--parallel", jobs],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    torch.ops.load_library(BUILD / "kron_kernels" / "_C_cuda_emulated.so")
    return torch.ops.kron_kernels_cuda_emulated


@pytest.fixture(autouse=True)
def emulated(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: "")
    monkeypatch.setattr(cuda, "_op", lambda name: getattr(ops, name).default)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.id)
def test_matmul_and_its_gradients(case: Case, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = accuracy.forward_case(case, dtype, "gelu")
    assert_accurate(cuda.kron_matmul(o.x, o.a, o.b, o.bias, 1), same_dtype, oracle)
    o, torchs, oracles = accuracy.backward_case(case, dtype)
    found = cuda.kron_matmul_backward(o.grad, o.x, o.a, o.b, 15)
    for actual, same, want, name in zip(found, torchs, oracles, ("dx", "da", "db", "dbias"), strict=True):
        assert_accurate(actual, same, want, name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_hopper(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, projections and the feed-forward block by the kernels with TMA and wgmma."""
    block, torchs, want = block_cases.ffn_case(FfnCase("k8", 17), dtype)
    norm = (None, None, None, 0.0)
    sm80 = cuda.kron_ffn(*block.layers, 1, *norm)
    monkeypatch.setenv("KRON_EMULATED_SM", "90")
    for shape in ("k8-attention-small", "k8-w1-small", "k8-w2-small"):
        o, same_dtype, oracle = accuracy.forward_case(Case(shape, 5), dtype)
        assert_accurate(cuda.kron_matmul(o.x, o.a, o.b, o.bias, 0), same_dtype, oracle)
        y, same = cuda.kron_qkv(o.x, [o.a, o.a], [o.b, o.b], [o.bias, o.bias], [])
        assert_accurate(y, same_dtype, oracle)
        assert torch.equal(y, same)
    sm90 = cuda.kron_ffn(*block.layers, 1, *norm)
    assert_accurate(sm90, torchs, want)
    assert not torch.equal(sm90, sm80)  # by other kernels


def test_float32_follows_the_setting_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    o = shapes.make(Case("k8-w1-small", 5))
    with pytest.raises(RuntimeError, match="compute float32 in TF32, which is off"):
        cuda.kron_matmul(o.x, o.a, o.b, o.bias, 0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert (cuda.kron_matmul(o.x, o.a, o.b, o.bias, 0) - accuracy.forward_oracle(o)).abs().max() < 2e-3


def test_shapes_around_the_kernels() -> None:
    o = shapes.make(Case("odd", 6), torch.bfloat16)
    grid = o.x.view(2, 3, -1)
    y = cuda.kron_matmul(o.x, o.a[0], o.b[0], o.bias, 0)  # one pair of matrices
    assert torch.equal(cuda.kron_matmul(grid, o.a, o.b, o.bias, 0), y.view(2, 3, -1))
    assert cuda.kron_matmul(grid[:0], o.a, o.b, o.bias, 0).shape == (0, 3, y.shape[-1])
    everything = cuda.kron_matmul_backward(o.grad, o.x, o.a, o.b, 15)
    for bit in range(4):
        some = cuda.kron_matmul_backward(o.grad, o.x, o.a, o.b, 1 << bit)
        assert [tensor.numel() for other, tensor in enumerate(some) if other != bit] == [0, 0, 0]
        assert torch.equal(some[bit], everything[bit])
    dx, *sums = cuda.kron_matmul_backward(o.grad[:0], o.x[:0], o.a, o.b, 15)
    assert dx.shape == (0, 10)
    assert all(tensor.eq(0).all() for tensor in sums)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_norm_and_projections(dtype: torch.dtype) -> None:
    o = shapes.make(Case("k8-w1-small", 5, 2, "strided-rows"), dtype)
    oracle = reference.kron_addmm(o.grad.double(), o.x.double(), o.a.double(), o.b.double(), 0.5)
    same_dtype = reference.kron_addmm(o.grad, o.x, o.a, o.b, 0.5)
    assert_accurate(cuda.kron_addmm(o.grad, o.x, o.a, o.b, 0.5), same_dtype, oracle)
    base = o.grad.contiguous()
    cuda.kron_addmm_(base, o.x, o.a, o.b, 0.5)
    assert_accurate(base, same_dtype, oracle)
    with pytest.raises(ValueError, match="base: expected a contiguous tensor, got strides that are not"):
        cuda.kron_addmm_(o.grad, o.x, o.a, o.b, 0.5)
    operands = (o.x, o.a, o.b, o.bias, *block_cases.norm_operands(o.grad, dtype))
    oracle = reference.kron_matmul_norm(*(tensor.double() for tensor in operands), 1e-5)
    assert_accurate(cuda.kron_matmul_norm(*operands, 1e-5), reference.kron_matmul_norm(*operands, 1e-5), oracle)
    parts = [shapes.make(Case("odd", 5), dtype), shapes.make_operands(((4, 5), (3, 2)), 5, dtype=dtype)]
    x = parts[0].x
    found = cuda.kron_qkv(x, [o.a for o in parts], [o.b for o in parts], [o.bias for o in parts], [])
    for y, part in zip(found, parts, strict=True):
        mine = shapes.Operands(x, part.a, part.b, part.bias, part.grad)
        assert_accurate(y, reference.kron_matmul(x, part.a, part.b, part.bias), accuracy.forward_oracle(mine))


FFN_SAMPLE = (
    *(FfnCase("k8", 5, 1, layout, "silu") for layout in LAYOUTS[:-1]),
    *(FfnCase("k8", 17, norm=True), FfnCase("k8", 1, activation=None), FfnCase("k8", 3, activation="relu")),
)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", FFN_SAMPLE, ids=lambda case: case.id)
def test_ffn_and_its_gradients(case: FfnCase, dtype: torch.dtype) -> None:
    o, same_dtype, oracle = block_cases.ffn_case(case, dtype)
    code = [None, *reference.ACTIVATIONS].index(case.activation)
    assert_accurate(
        cuda.kron_ffn(*o.layers, code, *(o.norm if case.norm else (None, None, None, 0.0))), same_dtype, oracle
    )
    found = cuda.kron_ffn_backward(o.grad, *o.layers[:-1], code, 127)
    for index, values in enumerate(zip(found, *block_cases.ffn_gradients(case, dtype), strict=True)):
        assert_accurate(*values, f"gradient {index}")
    some = cuda.kron_ffn_backward(o.grad, *o.layers[:-1], code, 0b0100010)
    assert [tensor.numel() > 0 for tensor in some] == [False, True, False, False, False, True, False]
    assert torch.equal(some[1], found[1])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_embedding_and_its_gradients(dtype: torch.dtype, norm: bool) -> None:
    """With indices of any layout that broadcast."""
    a, b = torch.randn(2, 11, 12).to(dtype), torch.randn(2, 1, 8).to(dtype)
    ids, positions = torch.randint(11, (5, 3)).T.int(), torch.arange(5).expand(3, 5)[:1]
    tables = (positions, torch.randn(5, 96).to(dtype), torch.ones(1, dtype=torch.int32), torch.randn(2, 96).to(dtype))
    weight, bias = (torch.randn(2, 96).to(dtype)) if norm else (None, None)
    operands = (ids, a, b, *tables, weight, bias)

    def double(*values: Any) -> list[Any]:
        return [one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for one in values]

    got = cuda.kron_embedding(*operands, 1e-5)
    assert_accurate(got, reference.kron_embedding(*operands, 1e-5), reference.kron_embedding(*double(*operands), 1e-5))
    inputs = (torch.randn(3, 5, 96).to(dtype), *operands[:-1])
    found = cuda.kron_embedding_backward(*inputs, 1e-5, 63)
    expected = reference.kron_embedding_backward(*inputs, 1e-5)
    oracles = reference.kron_embedding_backward(*double(*inputs), 1e-5)
    for index, values in enumerate(zip(found, expected, oracles, strict=True)):
        assert_accurate(*values, f"gradient {index}")
        assert torch.equal(cuda.kron_embedding_backward(*inputs, 1e-5, 1 << index)[index], found[index])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, a, b: cuda.kron_matmul(x[:, 1:], a, b, None, 0), r"x: expected .* got shape \(4, 9\)"),
        (lambda x, a, b: cuda.kron_matmul(x, a, b.half(), None, 0), "b: expected the dtype of x, got another dtype"),
        (lambda x, a, b: cuda.kron_matmul(x, a, b, x[0], 0), r"bias: expected .* \(21,\), got shape \(10,\)"),
        (lambda x, a, b: cuda.kron_matmul(x, a, b, None, 7), "activation: expected a code from 0 to 4, got 7"),
        (
            lambda x, a, b: cuda.kron_embedding(torch.tensor([1, 3]), a, b[:, :1], *[None] * 6, 0.0),
            "kron_embedding of 2 tokens, 1 terms of 3x5 .x. 1x2: the launch failed with CUDA error 1, .*no row of its",
        ),
    ],
    ids=["x", "dtype", "bias", "activation", "ids"],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    o = shapes.make(Case("odd", 4), torch.bfloat16)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
        call(o.x, o.a, o.b)


def test_unsupported_calls() -> None:
    def reason(
        op: str, sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, sm: int = 80, tokens: int = 4
    ) -> str:
        return str(cuda.unsupported_reason(Call(op, (Product(*sizes),), dtype, tokens, sm)))

    k8 = (1, 384, 384, 2, 2)
    assert all(reason(op, k8) == "None" for op in ("kron_matmul", "kron_addmm", "kron_qkv", "kron_matmul_norm"))
    assert reason("kron_embedding", (1, 30522, 96, 1, 8), torch.float32) == "None"
    assert reason("kron_matmul", k8, torch.int8) == "the CUDA kernels have no int8"
    assert "float64" in reason("kron_matmul", k8, torch.float64)
    assert "no factor is tiny" in reason("kron_matmul", (1, 24, 24, 32, 32))
    assert "more than 2^26 tokens" in reason("kron_matmul", k8, tokens=2**26 + 1)
    assert reason("kron_matmul", k8, sm=75) == "the kernels were built for 80+PTX 90a, not for sm_75"
    assert reason("kron_pack", k8) == "it has no kernel of kron_pack"
