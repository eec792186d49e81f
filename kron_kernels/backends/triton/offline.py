"""Compile recorded launches for a chip that need not be there, and read what became of them.

``launch.recording(DEVICES["sm_90"])`` around a launcher's call, on tensors of any device (meta tensors too), gives the
launches; ``compile_launch`` compiles one as Triton would for those arguments. Registers, spills, shared memory and the
kinds of instructions then show what a GPU would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..devices import shared_memory
from .configs import chip_name
from .launch import INTERPRETED, Device, Launch, describe

# Shared memory of gfx942: CDNA3 ISA guide.
DEVICES = {
    "sm_80": Device(80, 108, shared_memory(80)),
    "sm_89": Device(89, 128, shared_memory(89)),
    "sm_90": Device(90, 132, shared_memory(90)),
    "sm_100": Device(100, 148, shared_memory(100)),
    "gfx942": Device("gfx942", 304, 64 * 1024),
}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_ALIGNED = ["tt.divisibility", 16]
# Of AMD's pointers: offsets fit 32 bits, which lets the compiler take buffer instructions.
_SMALL = ["tt.pointer_range", 32]

# In a listing: /*0a10*/  @!P0 HGMMA.64x128x16.F32.BF16 R24, ...
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)
_WIDTH = re.compile(r"\.(?:[US]?(?P<bits>8|16|32|64|128|256))(?:\.|$)")
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


class Report(NamedTuple):
    """What a kernel was compiled to.

    ``registers``: of a thread. ``stack``: bytes of local memory of a thread; anything but 0 means registers spilled.
    ``shared``: bytes of a program. ``wgmma``: matrix products of whole warp groups (HGMMA of sm_90) or of tensor memory
    (UTC*MMA of sm_100). ``mma``: those of one warp (HMMA; MFMA of AMD). ``local``: loads and stores of local memory.
    ``stores``: stores to global memory, by bytes of a thread.
    """

    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    local: int
    stores: dict[int, int]


def compile_launch(launch: Launch, target: str | Device) -> Report:
    """Compile a recorded launch for one of ``DEVICES``, by name, or for another.

    Raises RuntimeError with the kernel and its constants where the compiler refuses.
    """
    device = _device(target)
    source = ASTSource(launch.kernel, *_specialise(launch, isinstance(device.arch, str)))
    options = launch.options._asdict()
    try:
        compiled = triton.compile(source, target=_gpu_target(device), options=options)
    except Exception as error:  # the compiler's own errors have no common class
        what = describe(launch.kernel, launch.constants, launch.options)
        raise RuntimeError(f"{what} does not compile for {chip_name(device.arch)}: {error}") from error
    if "amdgcn" in compiled.asm:
        return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def compile_all(jobs: Iterable[tuple[Launch, str | Device]], workers: int) -> Iterator[Report | RuntimeError]:
    """``compile_launch`` of many, in their order, with the error in the place of a report where one does not compile.

    Threads are enough: Triton's passes and the assembler run outside of Python's lock.
    """

    def one(job: tuple[Launch, str | Device]) -> Report | RuntimeError:
        try:
            return compile_launch(*job)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, jobs)


def key(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that run the same machine code."""
    signature, constants, attributes = _specialise(launch, amd=True)
    return launch.kernel, launch.options, *signature.values(), *constants.items(), str(attributes)


def _device(target: str | Device) -> Device:
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1")
    if isinstance(target, Device):
        return target
    if target not in DEVICES:
        raise ValueError(f"target: expected one of {', '.join(DEVICES)}, got {target!r}")
    return DEVICES[target]


def _gpu_target(device: Device) -> GPUTarget:
    return GPUTarget("hip", device.arch, 64) if isinstance(device.arch, str) else GPUTarget("cuda", device.arch, 32)


def _specialise(launch: Launch, amd: bool) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes of the arguments: the rules of Triton's own launches."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    parameters = launch.kernel.params
    if len(parameters) != len(launch.arguments) + len(launch.constants):
        raise ValueError(
            f"{launch.kernel.fn.__name__}: expected {len(parameters)} parameters, "
            f"got {len(launch.arguments)} arguments and {len(launch.constants)} constants"
        )
    for index, (parameter, value) in enumerate(zip(parameters, launch.arguments, strict=False)):
        attributes_of_one: list[list[Any]] = []
        if isinstance(value, Tensor):
            kind = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes_of_one.append(_ALIGNED)
            if amd and value.untyped_storage().nbytes() < 2**31:
                attributes_of_one.append(_SMALL)
        elif isinstance(value, float):
            kind = "fp32"
        elif value is None or (value == 1 and not parameter.do_not_specialize):
            kind, constants[parameter.name] = "constexpr", value
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes_of_one.append(_ALIGNED)
        signature[parameter.name] = kind
        if attributes_of_one:
            attributes[(index,)] = attributes_of_one
    for parameter, value in zip(parameters[len(launch.arguments) :], launch.constants, strict=True):
        signature[parameter.name], constants[parameter.name] = "constexpr", value
    return signature, constants, attributes


def _read_cubin(cubin: bytes, shared: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage", str(path))
        listing = _tool(triton.knobs.nvidia.nvdisasm, "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK of a kernel, got {usage!r}")
    counts = Counter(_SASS.findall(listing))
    stores: dict[int, int] = {}
    for name, count in counts.items():
        if name.startswith("STG"):
            width = _WIDTH.search(name)
            size = int(width["bits"]) // 8 if width else 4
            stores[size] = stores.get(size, 0) + count
    return Report(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=shared,
        wgmma=_count(counts, r"[HIQBD]GMMA|UTC\w*MMA"),
        mma=_count(counts, r"[HIQD]MMA"),
        local=_count(counts, r"LDL|STL"),
        stores=dict(sorted(stores.items())),
    )


def _read_amdgcn(text: str, shared: int) -> Report:
    numbers = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    counts = Counter(_AMDGCN.findall(text))
    stores: dict[int, int] = {}
    for name, count in counts.items():
        if name.startswith(("global_store_", "buffer_store_")):
            size = _AMD_BYTES.get(name.split("_")[2], 4)
            stores[size] = stores.get(size, 0) + count
    return Report(
        registers=numbers["vgpr_count"],
        stack=numbers["private_segment_fixed_size"],
        shared=shared,
        wgmma=0,
        mma=_count(counts, r"v_mfma"),
        local=_count(counts, r"scratch_(?:load|store)"),
        stores=dict(sorted(stores.items())),
    )


def _count(counts: Mapping[str, int], pattern: str) -> int:
    return sum(count for name, count in counts.items() if re.match(pattern, name))


def _tool(tool: Any, *arguments: str) -> str:
    return subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True).stdout
