"""The gates of the compiled CUDA kernels: what they read and judge, and the kernels of this build."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from bench import cuda_gates
from bench.cuda_gates import GateError, Kernel, judge
from bench.harness import write_rows

GOOD = Kernel("mm_sm80<Bf16, 2>", "sm_80", "13.0.88", 128, 0, 0, 4000, 512, 0, 0, 0)
HOPPER = Kernel("ffn_sm90<Bf16, 3>", "sm_90a", "13.0.88", 168, 0, 1024, 5000, 0, 64, 8, 0)
RECORD = {(kernel.kernel, kernel.arch): kernel for kernel in (GOOD, HOPPER)}

USAGE = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4kron4cuda3sumIfEEvNS0_9SumParamsE:
  REG:26 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90a
\t\tFunction : _ZN4kron4cuda3sumIfEEvNS0_9SumParamsE
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/               @P0 HGMMA.64x192x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;   /* 0x0 */
        /*0020*/              @!UP1 UTMALDG.2D [UR8], [UR4] ;       /* 0x0 */
        /*0030*/                   STL.64 [R1], R2 ;                /* 0x0 */
        /*0040*/             @!PT LDS RZ, [RZ] ;                    /* 0x0 */
"""


def test_reads_registers_and_instructions() -> None:
    name = ("sm_90a", "_ZN4kron4cuda3sumIfEEvNS0_9SumParamsE")
    assert dict(cuda_gates._usage(USAGE.splitlines())) == {name: (26, 8, 1024)}
    counts = dict(cuda_gates._instructions(SASS.splitlines()))
    assert counts == {name: {"LDC": 1, "HGMMA": 1, "UTMALDG": 1, "STL": 1, "LDS": 1}}


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("void kron::cuda::(anonymous namespace)::sum<kron::cuda::device::Bf16>(kron::cuda::Sum)", "sum<Bf16>"),
        ("void kron::cuda::sm90::f<float, (kron::Activation)1, true>(kron::cuda::sm90::P)", "f<float, 1, true>"),
        ("void kron::cuda::g<float, (int)1>(P)", "g<float, 1>"),
    ],
)
def test_short_names(full: str, short: str) -> None:
    assert cuda_gates._short(full) == short


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (replace(GOOD, stack=16), "local memory is used (16 bytes of stack, 0 accesses)"),
        (replace(GOOD, local=3), "local memory is used (0 bytes of stack, 3 accesses)"),
        (replace(GOOD, shared=50000), "50000 bytes of static shared memory, more than 49152"),
        (replace(GOOD, hmma=0), "no HMMA instruction"),
        (replace(HOPPER, hgmma=0), "0 HGMMA and 8 TMA instructions"),
        (replace(HOPPER, tma=0), "64 HGMMA and 0 TMA instructions"),
        (replace(GOOD, registers=129), "129 registers, on record 128"),
        (replace(GOOD, kernel="mm_sm80<F16, 2>"), "not on record (--record writes it)"),
    ],
)
def test_what_fails(kernel: Kernel, problem: str) -> None:
    assert judge([kernel], RECORD) == [f"{kernel.kernel} on {kernel.arch}: {problem}"]


def test_what_passes() -> None:
    elsewhere = replace(GOOD, arch="sm_120", instructions=None, hmma=None, hgmma=None, tma=None, local=None)
    newer = replace(GOOD, nvcc="14.0.1", registers=200)  # other registers of another compiler
    assert judge([GOOD, HOPPER, replace(GOOD, registers=100), newer], RECORD) == []
    wide = replace(elsewhere, stack=16)
    assert judge([wide], {("mm_sm80<Bf16, 2>", "sm_120"): wide}) == []
    assert len(judge([replace(wide, stack=24)], {("mm_sm80<Bf16, 2>", "sm_120"): wide})) == 1
    spilled = replace(GOOD, stack=16)
    assert len(judge([spilled], {("mm_sm80<Bf16, 2>", "sm_80"): spilled})) == 1
    gather = replace(GOOD, kernel="embedding_forward<float, 4>", hmma=0)
    assert judge([gather], {("embedding_forward<float, 4>", "sm_80"): gather}) == []
    assert judge([elsewhere], {("mm_sm80<Bf16, 2>", "sm_120"): elsewhere}) == []


def test_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    elsewhere = replace(GOOD, arch="sm_120", hmma=None)
    path = tmp_path / "record.csv"
    write_rows(path, [field.name for field in fields(Kernel)], map(asdict, (GOOD, elsewhere)))
    assert list(cuda_gates.load(path).values()) == [GOOD, elsewhere]
    assert cuda_gates.load(tmp_path / "none.csv") == {}


def test_kernels_of_this_build() -> None:
    """Nothing spills, the tensor cores are used, registers are as on record."""
    try:
        kernels = cuda_gates.read(cuda_gates.built_library())
    except GateError as reason:
        pytest.skip(str(reason))
    assert {kernel.arch for kernel in kernels} >= {"sm_80"}
    assert judge(kernels, cuda_gates.load(cuda_gates.RECORD)) == []
