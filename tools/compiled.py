"""Triton launches compiled for a chip that need not be there, and what became of them; problems to compile and tune.

``record`` gives the launches of a problem as they would be made on a chip, ``compile_launch`` compiles one as Triton
would for those arguments. Registers, spills, shared memory and kinds of instructions show what a GPU would run.
"""

from __future__ import annotations

import os
import re
import shutil
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

from kron_kernels.backends.base import Device
from kron_kernels.backends.devices import shared_memory
from kron_kernels.backends.triton import implementations
from kron_kernels.backends.triton.launch import INTERPRETED, Launch, name_of, recording
from kron_kernels.schemas.product import Product

# Shared memory of gfx942: CDNA3 ISA guide.
CHIPS = {
    "sm_80": Device(80, 108, shared_memory(80)),
    "sm_90": Device(90, 132, shared_memory(90)),
    "sm_100": Device(100, 148, shared_memory(100)),
    "gfx942": Device("gfx942", 304, 64 * 1024),
}
# "tf32": float32 whose products may be rounded, as torch's setting says.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# "k8", "k21": table 1 of KroneckerBERT (NAACL 2022). "tq": TQCompressor's feed-forward of GPT-2, four terms.
PRODUCTS = {
    "k8-attention": Product(1, 384, 384, 2, 2),
    "k8-w1": Product(1, 8, 2, 384, 384),
    "k8-w2": Product(1, 2, 8, 384, 384),
    "k21-attention": Product(1, 384, 48, 2, 16),
    "k21-w1": Product(1, 16, 2, 192, 384),
    "k21-w2": Product(1, 2, 16, 384, 192),
    "tq-w1": Product(4, 768, 384, 4, 2),
    "tq-w2": Product(4, 384, 768, 2, 4),
    "balanced-attention": Product(1, 24, 24, 32, 32),
    "balanced-w1": Product(1, 64, 16, 48, 48),
    "balanced-w2": Product(1, 16, 64, 48, 48),
}
MODELS = ("k8", "k21", "balanced")
EMBEDDINGS = {"k8": Product(1, 30522, 96, 1, 8), "k21": Product(1, 30522, 48, 1, 16)}
# By op, the names of what it is compiled and tuned for: products, or models for whole blocks.
PROBLEMS: dict[str, tuple[str, ...]] = {
    "kron_matmul": tuple(PRODUCTS),
    "kron_matmul_backward": tuple(PRODUCTS),
    "kron_addmm": ("k8-attention", "balanced-attention"),
    "kron_matmul_norm": ("k8-attention", "k21-attention", "balanced-attention"),
    "kron_ffn": MODELS,
    "kron_ffn_backward": MODELS,
    "kron_qkv": MODELS,
    "kron_embedding": tuple(EMBEDDINGS),
    "kron_embedding_backward": tuple(EMBEDDINGS),
}


class Problem(NamedTuple):
    """A call of one op; ``name`` is one of ``PROBLEMS``."""

    op: str
    name: str
    dtype: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.op} {self.name} {self.dtype} T{self.tokens}"

    def operands(self, device: str) -> tuple[Any, ...]:
        """The op's arguments, with results of order one; on "meta" tensors without values."""

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(size, dtype=DTYPES[self.dtype], device=device) * scale

        def factors(product: Product) -> tuple[Tensor, Tensor, Tensor]:
            terms, m1, n1, m2, n2 = product
            a, b = normal(terms, m1, n1, scale=(terms * n1) ** -0.5), normal(terms, m2, n2, scale=n2**-0.5)
            return a, b, normal(m1 * m2)

        op, tokens = self.op, self.tokens
        if op.startswith("kron_embedding"):
            _, rows, p, _, k = EMBEDDINGS[self.name]
            ids = torch.arange(tokens, device=device) * 7919 % (rows // 8)  # words repeat
            tables = (ids % 512, normal(512, p * k), torch.zeros_like(ids), normal(2, p * k))
            operands = (ids, normal(1, rows, p), normal(1, 1, k), *tables, normal(p * k))
            last = (1e-12, 63) if op.endswith("backward") else (normal(p * k), 1e-12)
            return (*((normal(tokens, p * k),) if op.endswith("backward") else ()), *operands, *last)
        if op.startswith("kron_ffn"):
            first, last = PRODUCTS[f"{self.name}-w1"], PRODUCTS[f"{self.name}-w2"]
        else:
            first = last = PRODUCTS[self.name if self.name in PRODUCTS else f"{self.name}-attention"]
        x, y = normal(tokens, first.n1 * first.n2), normal(tokens, last.m1 * last.m2)
        a, b, bias = factors(first)
        a2, b2, bias2 = factors(last)
        calls: dict[str, tuple[Any, ...]] = {
            "kron_matmul": (x, a, b, bias, int(self.name.endswith("w1"))),
            "kron_matmul_backward": (y, x, a, b, 15),
            "kron_addmm": (y, x, a, b, 0.5),
            "kron_matmul_norm": (x, a, b, bias, y, bias, bias2, 1e-12),
            "kron_ffn": (x, a, b, bias, a2, b2, bias2, 1, None, None, None, 1e-12),
            "kron_ffn_backward": (y, x, a, b, bias, a2, b2, 1, 127),
            "kron_qkv": (x, [a, a2, a], [b, b2, b], [bias, bias2, bias], []),
        }
        return calls[op]

    def run(self, operands: tuple[Any, ...]) -> Any:
        """The op's result by the Triton kernels, with torch's float32 products set as the problem wants them."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.dtype == "tf32" else "highest")
        try:
            return implementations()[self.op](*operands)
        finally:
            torch.set_float32_matmul_precision(before)


def record(problem: Problem, device: Device) -> list[Launch]:
    """The launches that a problem comes to on a device that need not be there."""
    with recording(device) as launches:
        problem.run(problem.operands("meta"))
    return launches


class Report(NamedTuple):
    """What a kernel was compiled to.

    ``registers`` of a thread; ``stack``, its bytes of local memory: anything but 0 means that registers spilled;
    ``shared``, bytes of a program; ``wgmma``, matrix products of whole warp groups (HGMMA of sm_90) or of tensor memory
    (UTC*MMA of sm_100); ``mma``, those of one warp (HMMA; MFMA of AMD); ``local``, loads and stores of local memory;
    ``stores`` to global memory, by bytes of a thread.
    """

    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    local: int
    stores: str


def compile_launch(launch: Launch, device: Device) -> Report:
    """Compile a recorded launch for a device. Raises RuntimeError with the kernel where the compiler does."""
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1")
    amd = isinstance(device.arch, str)
    target = GPUTarget("hip", device.arch, 64) if amd else GPUTarget("cuda", device.arch, 32)
    try:
        source = ASTSource(launch.kernel, *specialise(launch, amd))
        compiled = triton.compile(source, target=target, options=launch.options._asdict())
    except Exception as error:  # the compiler's own errors have no common class
        what = name_of(launch.kernel, launch.constants, launch.options)
        raise RuntimeError(f"{what} does not compile for {device.arch}: {error}") from error
    if amd:
        text = compiled.asm["amdgcn"]
        numbers = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        counts = Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
        usage = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    else:
        usage, counts = _read_cubin(compiled.asm["cubin"])
    return Report(
        *usage,
        shared=compiled.metadata.shared,
        wgmma=count(counts, r"[HIQBD]GMMA|UTC\w*MMA"),
        mma=count(counts, r"[HIQD]MMA|v_mfma"),
        local=count(counts, r"LDL|STL|scratch_(?:load|store)"),
        stores=widths(counts, r"STG|(?:global|buffer)_store_"),
    )


def compile_all(jobs: Iterable[tuple[Launch, Device]]) -> Iterator[Report | RuntimeError]:
    """``compile_launch`` of many, in their order, with the error in the place of a report where one does not compile.

    Threads are enough: Triton's passes and the assembler run outside of Python's lock.
    """

    def one(job: tuple[Launch, Device]) -> Report | RuntimeError:
        try:
            return compile_launch(*job)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, jobs)


def specialise(launch: Launch, amd: bool) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes of the arguments: the rules of Triton's own launches."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    values = (*launch.arguments, *launch.constants)
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
        of_one: list[list[Any]] = []
        if isinstance(value, Tensor):
            kind = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
            if value.data_ptr() % 16 == 0:
                of_one.append(["tt.divisibility", 16])
            if amd and value.untyped_storage().nbytes() < 2**31:
                of_one.append(["tt.pointer_range", 32])  # offsets fit 32 bits, which allows buffer instructions
        elif isinstance(value, float):
            kind = "fp32"
        elif index >= len(launch.arguments) or value is None or (value == 1 and not parameter.do_not_specialize):
            kind, constants[parameter.name] = "constexpr", value
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                of_one.append(["tt.divisibility", 16])
        signature[parameter.name] = kind
        if of_one:
            attributes[(index,)] = of_one
    return signature, constants, attributes


def _read_cubin(cubin: bytes) -> tuple[tuple[int, int], Counter[str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = output("cuobjdump", "--dump-resource-usage", str(path))
        listing = output("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return (int(found[1]), int(found[2])), Counter(SASS.findall(listing))


# In a listing: /*0a10*/  @!P0 HGMMA.64x128x16.F32.BF16 R24, ...
SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)


def count(counts: Mapping[str, int], pattern: str) -> int:
    """How many instructions begin with a pattern."""
    return sum(number for name, number in counts.items() if re.match(pattern, name))


def widths(counts: Mapping[str, int], pattern: str) -> str:
    """Instructions that begin with a pattern, by bytes of a thread: "2x4 8x16" is two of 4 bytes, eight of 16."""
    found: Counter[int] = Counter()
    amd = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    for name, number in counts.items():
        if re.match(pattern, name):
            bits = re.search(r"\.[US]?(8|16|32|64|128|256)(?:\.|$)", name)
            found[int(bits[1]) // 8 if bits else amd.get(name.split("_")[-1], 4)] += number
    return " ".join(f"{number}x{size}" for size, number in sorted(found.items()))


def output(name: str, *arguments: str) -> str:
    """What a program of the CUDA toolkit or of Triton's wheel prints. Raises RuntimeError where neither is there."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    folders = os.pathsep.join((os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home), str(own)))
    path = shutil.which(name, path=folders)
    if path is None:
        raise RuntimeError(f"{name} was not found: it is part of the CUDA toolkit and of Triton")
    environment = {**os.environ, "PATH": folders}  # cuobjdump looks there for nvdisasm
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True, env=environment).stdout
