"""Compile every Triton kernel with its shipped tiles for several chips, no GPU needed, and hold it to what is expected.

python -m bench.triton_gates                        all of it, some 20 minutes on two cores
python -m bench.triton_gates --name k8-ffn --chip sm_90 --dtype bf16 --check

Fails where a kernel does not compile, spills registers, takes more shared memory than the chip has, leaves the tensor
cores of sm_90 to single warps in a large product of 16-bit numbers, or, on AMD, spills more than it did. Without
--check what was read goes to bench/results/triton-kernels.csv once nothing fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.harness import RESULTS, Row, read_rows, write_rows
from kron_kernels.backends.triton.launch import Launch
from kron_kernels.backends.triton.offline import DEVICES, Report, compile_all, key
from kron_kernels.backends.triton.ops import IMPLEMENTATIONS
from kron_kernels.backends.triton.problems import (
    DTYPES,
    EMBEDDINGS,
    FFNS,
    LAYERS,
    QKVS,
    Problem,
    problems,
    record,
)
from kron_kernels.cli.output import Progress

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
NAMES = (*LAYERS, *FFNS, *QKVS, *EMBEDDINGS)
KEY = ("problem", "op", "dtype", "tokens", "launch", "chip")
COLUMNS = (
    *("kernel", "constants", "warps", "stages", "registers", "stack", "shared"),
    *("wgmma", "mma", "local", "stores", "triton"),
)
# Fewer tokens than this need not fill warp groups.
LARGE_TOKENS = 1024


class Job(NamedTuple):
    """One launch of a problem on a chip; ``index`` counts the launches of a problem."""

    problem: Problem
    index: int
    chip: str
    launch: Launch


def main() -> None:
    arguments = parse()
    wanted = problems(IMPLEMENTATIONS, arguments.name, arguments.dtype, arguments.tokens)
    jobs = list(enumerate_jobs(wanted, arguments.chip, IMPLEMENTATIONS))
    path = arguments.out / "triton-kernels.csv"
    last = {row_key(row): row for row in read_rows(path)}
    rows, failures = check(jobs, compile_jobs(jobs, arguments.workers), last)
    print(f"{len(rows)} launches of {len({job.problem for job in jobs})} problems; {len(failures)} failures")
    for failure in failures:
        print(failure, file=sys.stderr)
    if not failures and not arguments.check:
        last.update((row_key(row), row) for row in rows)
        write_rows(path, (*KEY, *COLUMNS), last.values())
    sys.exit(1 if failures else 0)


def enumerate_jobs(
    wanted: Iterable[Problem], chips: Sequence[str], implementations: Mapping[str, Callable[..., Any]]
) -> Iterable[Job]:
    """Every launch of every problem on every chip."""
    for problem in wanted:
        for chip in chips:
            for index, launch in enumerate(record(problem, implementations, DEVICES[chip])):
                yield Job(problem, index, chip, launch)


def compile_jobs(jobs: Sequence[Job], workers: int) -> list[Report | RuntimeError]:
    """What became of each job's kernel; launches that run the same code are compiled once."""
    different = {(job.chip, key(job.launch)): (job.launch, job.chip) for job in jobs}
    progress, compiled = Progress(), {}
    for done, (code, report) in enumerate(zip(different, compile_all(different.values(), workers), strict=True)):
        progress(done, len(different), f"{different[code][0].kernel.fn.__name__} for {code[0]}")
        compiled[code] = report
    return [compiled[job.chip, key(job.launch)] for job in jobs]


def check(
    jobs: Sequence[Job], reports: Sequence[Report | RuntimeError], last: Mapping[tuple[str, ...], Row]
) -> tuple[list[Row], list[str]]:
    """A row for each job that compiled, and what is wrong, one line each."""
    rows, failures = [], []
    for job, report in zip(jobs, reports, strict=True):
        where = f"{job.problem.id}, launch {job.index} on {job.chip}"
        if isinstance(report, RuntimeError):
            failures.append(f"{where}: {report}")
            continue
        row = row_of(job, report)
        rows.append(row)
        before = last.get(row_key(row))
        wrong = [*broken_rules(job, report), *([] if before is None else regressions(job, report, before))]
        kernel = f"{row['kernel']}({row['constants']}), {row['warps']} warps, {row['stages']} stages"
        failures += [f"{where}: {kernel}: {text}" for text in wrong]
    return rows, failures


def broken_rules(job: Job, report: Report) -> Iterable[str]:
    """What a kernel may not do, whatever it did before."""
    limit = DEVICES[job.chip].shared
    if report.shared > limit:
        yield f"{report.shared} bytes of shared memory, the chip has {limit}"
    if job.chip.startswith("sm_") and report.stack + report.local > 0:
        yield f"spills: {report.stack} bytes of stack, {report.local} loads and stores of local memory"
    large = job.problem.tokens >= LARGE_TOKENS and job.problem.dtype in ("bf16", "fp16")
    if job.chip == "sm_90" and large and report.mma > 0 and report.wgmma == 0:
        yield f"products of single warps ({report.mma} HMMA) and none of warp groups"


def regressions(job: Job, report: Report, before: Row) -> Iterable[str]:
    """What is worse than the last file has it."""
    if report.stack > int(before["stack"]):
        yield f"spills {report.stack} bytes, {before['stack']} in the last results"
    if job.chip == "sm_90" and report.wgmma == 0 and int(before["wgmma"]) > 0:
        yield f"no products of warp groups, {before['wgmma']} in the last results"


def row_of(job: Job, report: Report) -> Row:
    launch, problem = job.launch, job.problem
    names = launch.kernel.arg_names[-len(launch.constants) :]
    return {
        "problem": problem.name,
        "op": problem.op,
        "dtype": problem.dtype,
        "tokens": problem.tokens,
        "launch": job.index,
        "chip": job.chip,
        "kernel": launch.kernel.fn.__name__,
        "constants": " ".join(f"{name}={value}" for name, value in zip(names, launch.constants, strict=True)),
        "warps": launch.options.num_warps,
        "stages": launch.options.num_stages,
        **report._asdict(),
        "stores": " ".join(f"{count}x{size}" for size, count in report.stores.items()),
        "triton": triton.__version__,
    }


def row_key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in KEY)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 4096])
    parser.add_argument("--chip", nargs="+", choices=list(DEVICES), default=CHIPS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--check", action="store_true", help="do not write the results file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
