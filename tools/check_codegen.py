"""Check what the compilers make of the GPU kernels; no GPU is needed.

    python -m tools.check_codegen triton --op kron_ffn --chip sm_90    # compiles, seconds to 20 minutes for everything
    python -m tools.check_codegen cuda                                 # reads the built library

Fails where a kernel does not compile, spills registers, needs more shared memory than the chip has, has no tensor-core
instruction where it should (HMMA on sm_80, HGMMA on sm_90, TMA loads of the CUDA kernels there), or is worse than the
record in bench/results/{triton,cuda}-kernels.csv. ``--record`` writes the record once nothing fails.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton

from kron_kernels.backends.base import PACKAGE, build_info
from tools.compiled import CHIPS, DTYPES, PROBLEMS, SASS, Problem, Report, compile_all, count, output, record, widths

Row = dict[str, Any]
RESULTS = PACKAGE.parent / "bench" / "results"
KEYS = {"triton": ("op", "problem", "dtype", "tokens", "launch", "chip"), "cuda": ("kernel", "arch")}
# CUDA kernels that gather, copy or add up.
_WITHOUT_PRODUCTS = re.compile("embedding_|pack_|sum_|finish_")
# After sm_90 the few bytes of stack on record are allowed.
_NO_STACK = ("sm_80", "sm_90", "sm_90a")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", choices=tuple(KEYS))
    parser.add_argument("--op", nargs="+", choices=tuple(PROBLEMS), default=tuple(PROBLEMS))
    parser.add_argument("--name", nargs="+", help="of problems, as in tools/compiled.py; default: all of the ops")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--chip", nargs="+", choices=tuple(CHIPS), default=["sm_80", "sm_90"])
    parser.add_argument("--library", type=Path, help="libkron_cuda; the package's own by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--record", action="store_true", help="write the record once nothing fails")
    arguments = parser.parse_args(argv)
    path, key = arguments.results / f"{arguments.kernels}-kernels.csv", KEYS[arguments.kernels]
    recorded = {tuple(row[name] for name in key): row for row in read(path)}
    try:
        rows = triton_rows(arguments) if arguments.kernels == "triton" else cuda_rows(arguments.library)
        failures = list(problems_of(arguments.kernels, rows, {} if arguments.record else recorded))
    except RuntimeError as error:
        print(f"check_codegen: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows)} kernels, {len(failures)} failures", *failures, sep="\n")
    if arguments.record and not failures:
        recorded.update({tuple(str(row[name]) for name in key): row for row in rows})
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(recorded.values())
    return int(bool(failures))


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def triton_rows(arguments: argparse.Namespace) -> list[Row]:
    """A row for each launch of the problems; its ``error`` where it does not compile."""
    rows, jobs = [], []
    for op in arguments.op:
        for name in PROBLEMS[op]:
            if arguments.name and name not in arguments.name:
                continue
            for dtype in arguments.dtype:
                for tokens in arguments.tokens:
                    for chip in arguments.chip:
                        for index, launch in enumerate(record(Problem(op, name, dtype, tokens), CHIPS[chip])):
                            jobs.append((launch, CHIPS[chip]))
                            rows.append(dict(zip(KEYS["triton"], (op, name, dtype, tokens, index, chip), strict=True)))
    for row, (launch, _), report in zip(rows, jobs, compile_all(jobs), strict=True):
        constants = zip(launch.kernel.arg_names[-len(launch.constants) :], launch.constants, strict=True)
        row["kernel"] = launch.kernel.fn.__name__
        row["constants"] = " ".join(f"{name}={value}" for name, value in constants)
        row.update(launch.options._asdict())
        row.update(report._asdict() if isinstance(report, Report) else {"error": str(report)})
        row["compiler"] = triton.__version__
    return rows


def cuda_rows(library: Path | None) -> list[Row]:
    """A row for each kernel of the built library on each architecture. Raises RuntimeError where none was built."""
    library = library or next(iter(sorted(PACKAGE.glob("libkron_cuda.so*"))), None)
    if library is None:
        raise RuntimeError(f"the CUDA kernels are {build_info().get('cuda', 'not built')}")
    counts = dict(_functions(output("cuobjdump", "-sass", str(library))))
    rows = []
    for arch, name, *usage in _usage(output("cuobjdump", "--dump-resource-usage", str(library))):
        found = counts.get((arch, name), Counter())
        row = {"kernel": name, "arch": arch, **dict(zip(("registers", "stack", "shared"), usage, strict=True))}
        row.update(wgmma=count(found, "HGMMA"), mma=count(found, "HMMA"), tma=count(found, "UTMALDG|UBLKCP"))
        row.update(local=count(found, "LDL|STL"), loads=widths(found, "LDG"), stores=widths(found, "STG"))
        rows.append({**row, "compiler": build_info().get("cuda_compiler", "")})
    names = [row["kernel"] for row in rows]
    full = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for row, name in zip(rows, full.splitlines(), strict=True):
        name = re.sub(r"\bkron::(\w+::)*|\(anonymous namespace\)::|^void ", "", name)
        row["kernel"] = re.sub(r"\([\w:]+\)(\d+)", r"\1", re.sub(r"\([^()]*\)$", "", name))
    return sorted(rows, key=lambda row: (row["arch"], row["kernel"]))


def _usage(text: str) -> Iterator[tuple[Any, ...]]:
    """Architecture, mangled name, registers, stack and static shared memory."""
    arch = name = ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield arch, name, *map(int, match.groups())


def _functions(text: str) -> Iterator[tuple[tuple[str, str], Counter[str]]]:
    """(architecture, mangled name) and how often each instruction occurs."""
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        for function in part.split("Function : ")[1:]:
            yield (part.split()[0], function.split()[0]), Counter(SASS.findall(function))


def problems_of(kernels: str, rows: Sequence[Row], recorded: Mapping[tuple[str, ...], Row]) -> Iterator[str]:
    """What is wrong with the kernels, a line each."""
    for row in rows:
        key = tuple(str(row[name]) for name in KEYS[kernels])
        before, where = recorded.get(key), f"{' '.join(key)}: {row['kernel']}"
        if "error" in row:
            yield f"{where}: {row['error']}"
            continue
        chip = row["chip"] if kernels == "triton" else row["arch"]
        limit = CHIPS[chip].shared if kernels == "triton" else 48 * 1024  # what every device gives a block unasked
        allowed = 0 if before is None or chip in _NO_STACK else int(before["stack"])
        if (row["stack"] > allowed or row["local"]) and (chip.startswith("sm_") or before is not None):
            yield f"{where}: spills {row['stack']} bytes, {row['local']} loads and stores of local memory"
        if row["shared"] > limit:
            yield f"{where}: {row['shared']} bytes of shared memory, more than {limit}"
        if kernels == "cuda":
            if chip == "sm_80" and not row["mma"] and not _WITHOUT_PRODUCTS.match(row["kernel"]):
                yield f"{where}: no HMMA instruction"
            if chip == "sm_90a" and not (row["wgmma"] and row["tma"]):
                yield f"{where}: {row['wgmma']} HGMMA and {row['tma']} TMA instructions"
            if before is None and recorded:
                yield f"{where}: not on record (--record writes it)"
        elif (
            chip == "sm_90"
            and row["mma"]
            and not row["wgmma"]
            and row["dtype"] in ("bf16", "fp16")
            and row["tokens"] >= 1024
        ):
            yield f"{where}: {row['mma']} HMMA and no HGMMA instructions"
        if before and before["compiler"] == row["compiler"] and row["registers"] > int(before["registers"]):
            yield f"{where}: {row['registers']} registers, on record {before['registers']}"


if __name__ == "__main__":
    sys.exit(main())
