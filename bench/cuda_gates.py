"""What the compiler made of the CUDA kernels, read off the built library: no GPU needed.

python -m bench.cuda_gates [--library FILE] [--results bench/results/cuda-kernels.csv] [--record]

Fails where a kernel keeps anything in local memory (spilled registers, indexed arrays), or after sm_90 more than on
record, where a tensor-core kernel has no tensor-core instruction (HMMA of sm_80, HGMMA and TMA loads of sm_90a), and
where it takes more registers than on record, if that was made by the same nvcc. ``--record`` writes the record anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from bench.harness import RESULTS, ROOT, read_rows, write_rows

PACKAGE = ROOT / "kron_kernels"
RECORD = RESULTS / "cuda-kernels.csv"
# Instructions counted, by the column of the record that holds them.
_COUNTED = {"hmma": ("HMMA",), "hgmma": ("HGMMA",), "tma": ("UTMALDG", "UBLKCP"), "local": ("LDL", "STL")}
# The architectures whose instructions are read. A kernel without a stack touches no local memory on any.
_DISASSEMBLED = ("sm_80", "sm_90a")
# Elsewhere the few bytes on record are let pass.
_NO_STACK = ("sm_80", "sm_90", "sm_90a")
# Kernels that gather, copy or add up.
_WITHOUT_PRODUCTS = re.compile("embedding_|pack_|sum_|finish_")
_STATIC_SHARED = 48 * 1024  # what every device gives a block unasked


class GateError(Exception):
    """Why the gates cannot be applied here."""


@dataclass(frozen=True)
class Kernel:
    """A kernel on one architecture: registers of a thread, bytes of stack and of shared memory before any is asked for.

    Instructions are counted on some architectures, elsewhere None.
    """

    kernel: str
    arch: str
    nvcc: str
    registers: int
    stack: int
    shared: int
    instructions: int | None = None
    hmma: int | None = None
    hgmma: int | None = None
    tma: int | None = None
    local: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=None, help="libkron_cuda; the package's own by default")
    parser.add_argument("--results", type=Path, default=RECORD, help="the record")
    parser.add_argument("--record", action="store_true", help="write the record anew")
    arguments = parser.parse_args()
    try:
        kernels = read(arguments.library or built_library())
    except GateError as error:
        sys.exit(f"cuda_gates: {error}")
    if arguments.record:
        write_rows(arguments.results, [field.name for field in fields(Kernel)], map(asdict, kernels))
    problems = judge(kernels, load(arguments.results))
    archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
    print(f"{len(kernels)} kernels of {archs}; at most {max(kernel.registers for kernel in kernels)} registers")
    if problems:
        sys.exit("\n".join(problems))


def built_library() -> Path:
    """The library in the source tree."""
    found = sorted(PACKAGE.glob("libkron_cuda.so*"))
    if not found:
        raise GateError(f"the CUDA kernels are {_build_info().get('cuda', 'not built')}")
    return found[0]


def tool(name: str) -> str:
    """A program of the CUDA toolkit or of Triton's wheel."""
    folders = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in _cuda_homes())]
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    path = shutil.which(name, path=os.pathsep.join(folders))
    if not path:
        raise GateError(f"{name} was not found: it is part of the CUDA toolkit and of Triton")
    return path


def _cuda_homes() -> Iterator[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield os.environ[variable]
    yield "/usr/local/cuda"


def read(library: Path) -> list[Kernel]:
    """Every kernel of a library, in the order of architecture and name."""
    cuobjdump = tool("cuobjdump")
    # cuobjdump disassembles through nvdisasm, which it looks for on PATH.
    path = f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path}
    usage = dict(_usage(_lines([cuobjdump, "--dump-resource-usage", str(library)], environment)))
    counts: dict[tuple[str, str], Counter[str]] = {}
    for arch in sorted({arch for arch, _ in usage}.intersection(_DISASSEMBLED)):
        counts.update(_instructions(_lines([cuobjdump, "-sass", "-arch", arch, str(library)], environment)))
    names = _demangle(sorted({name for _, name in usage}))
    nvcc = _build_info().get("cuda_compiler", "")
    kernels = []
    for (arch, name), (registers, stack, shared) in usage.items():
        kernel = Kernel(names[name], arch, nvcc, registers, stack, shared)
        if arch in _DISASSEMBLED:
            count = counts[arch, name]
            columns = {column: sum(count[code] for code in codes) for column, codes in _COUNTED.items()}
            kernel = replace(kernel, instructions=count.total(), **columns)
        kernels.append(kernel)
    return sorted(kernels, key=lambda kernel: (kernel.arch, kernel.kernel))


def _lines(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise GateError(f"{' '.join(command)} failed")


def _usage(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], tuple[int, int, int]]]:
    """(architecture, mangled name) and (registers, stack, static shared memory)."""
    arch = name = ""
    for line in lines:
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield (arch, name), (int(match[1]), int(match[2]), int(match[3]))


def _instructions(lines: Iterable[str]) -> Iterator[tuple[tuple[str, str], Counter[str]]]:
    """(architecture, mangled name) and how often each instruction occurs."""
    arch, count = "", Counter[str]()
    for line in lines:
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := re.match(r"\s+Function : (\S+)", line):
            count = Counter()
            yield (arch, match[1]), count  # filled by what follows
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)", line):
            count[match[1]] += 1


def _demangle(names: list[str]) -> dict[str, str]:
    """Short names: without namespaces and parameters."""
    if not shutil.which("c++filt"):
        raise GateError("c++filt, of the binutils, was not found")
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: _short(full) for name, full in zip(names, done.stdout.splitlines(), strict=True)}


def _short(name: str) -> str:
    name = re.sub(r"\bkron::(\w+::)*|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\([\w:]+\)(\d+)", r"\1", re.sub(r"\([^()]*\)$", "", name))


def judge(kernels: list[Kernel], recorded: dict[tuple[str, str], Kernel]) -> list[str]:
    """What is wrong with the kernels, a line each."""
    problems = []
    for kernel in kernels:
        where = f"{kernel.kernel} on {kernel.arch}"
        before = recorded.get((kernel.kernel, kernel.arch))
        stack = 0 if before is None or kernel.arch in _NO_STACK else before.stack
        if kernel.stack > stack or kernel.local:
            problems.append(f"{where}: local memory is used ({kernel.stack} bytes of stack, {kernel.local} accesses)")
        if kernel.shared > _STATIC_SHARED:
            problems.append(f"{where}: {kernel.shared} bytes of static shared memory, more than {_STATIC_SHARED}")
        if kernel.hmma == 0 and kernel.arch == "sm_80" and not _WITHOUT_PRODUCTS.match(kernel.kernel):
            problems.append(f"{where}: no HMMA instruction")
        if kernel.arch == "sm_90a" and not (kernel.hgmma and kernel.tma):
            problems.append(f"{where}: {kernel.hgmma} HGMMA and {kernel.tma} TMA instructions")
        if before is None:
            problems.append(f"{where}: not on record (--record writes it)")
        elif before.nvcc == kernel.nvcc and kernel.registers > before.registers:
            problems.append(f"{where}: {kernel.registers} registers, on record {before.registers}")
    return problems


def load(path: Path) -> dict[tuple[str, str], Kernel]:
    """The record, by kernel and architecture; {} where there is none."""
    texts = {"kernel", "arch", "nvcc"}
    kernels = {}
    for row in read_rows(path):
        values = {name: value if name in texts else int(value) if value else None for name, value in row.items()}
        kernels[row["kernel"], row["arch"]] = Kernel(**values)
    return kernels


def _build_info() -> dict[str, str]:
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    main()
