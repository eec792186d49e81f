"""Measure tiles of the Triton kernels on the GPU that is there and write them where later calls look them up.

    python -m tools.tune_triton                                  # K8, K21, TQCompressor, balanced shapes in bfloat16
    python -m tools.tune_triton --op kron_ffn --tokens 4096 --minutes 5

For each class of problems it takes blocks around the default ones, then other warps and stages for the best; drops what
does not compile, spills or needs too much shared memory; and keeps the fastest with which the op is right. The file is
written after every class: started again with the same Triton and device, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kron_kernels.backends.base import Device
from kron_kernels.backends.reference import IMPLEMENTATIONS as REFERENCE
from kron_kernels.backends.triton import tuned
from kron_kernels.backends.triton.launch import Launch, device_of, launch, recording
from tools.compiled import DTYPES, PROBLEMS, Problem, Report, compile_all

Tiles = dict[str, int]
_LARGEST = 256
# Of the tiles tried with the default warps and stages, how many go on to others.
_KEPT = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=tuple(PROBLEMS), default=tuple(PROBLEMS))
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32768, 4096, 128])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no new search is started")
    parser.add_argument("--out", type=Path, default=os.environ.get(tuned.VARIABLE, tuned.FOLDER))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune_triton: error: torch finds no CUDA device to measure on", file=sys.stderr)
        return 2
    device, end = device_of(torch.empty(0, device="cuda")), time.monotonic() + 60 * arguments.minutes
    path = Path(arguments.out) / f"{tuned.chip_name(device.arch)}.json"
    header = {"version": tuned.VERSION, "device": torch.cuda.get_device_name(), "triton": triton.__version__}
    for op, dtype, tokens in itertools.product(arguments.op, arguments.dtype, arguments.tokens):
        for name in PROBLEMS[op]:
            problem = Problem(op, name, dtype, tokens)
            operands = problem.operands("cuda")
            with tuned.watching() as found, recording(device):
                problem.run(operands)
            for look_up in {each.key: each for each in found}.values():
                entries = entries_of(path, header)
                if look_up.key in entries:
                    continue
                if time.monotonic() > end:
                    print(f"the time is over before {look_up.key}; start again to go on", file=sys.stderr)
                    return 3
                entry = search(look_up, problem, operands, device, seconds_of)
                print(
                    f"{problem}: {look_up.key}: {entry or 'no tiles are right, not even the default ones'}", flush=True
                )
                if entry:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    text = json.dumps(
                        {**header, "entries": dict(sorted({**entries, look_up.key: entry}.items()))}, indent=1
                    )
                    partial = path.with_suffix(".tmp")
                    partial.write_text(text + "\n")
                    partial.replace(path)
    return 0


def entries_of(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The entries of a file; none of what was measured on another device or by another Triton."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text())
    return tuned.read(path) if all(data.get(name) == value for name, value in header.items()) else {}


def search(
    look_up: tuned.LookUp,
    problem: Problem,
    operands: tuple[Any, ...],
    device: Device,
    seconds_of: Callable[[Sequence[Launch]], float],
) -> dict[str, Any] | None:
    """The fastest tiles of a class with which the problem is right, as an entry; None where there are none."""
    default = look_up.default._asdict()
    times: dict[tuple[int, ...], float] = {}

    def measure(candidates: Iterator[Tiles]) -> None:
        new = {tuple(tiles.values()): tiles for tiles in candidates if tuple(tiles.values()) not in times}
        recorded = {values: _launches(look_up, tiles, problem, operands, device) for values, tiles in new.items()}
        jobs = [(values, one) for values, launches in recorded.items() for one in launches or ()]
        reports = compile_all([(one, device) for _, one in jobs])
        failed = {values for (values, _), report in zip(jobs, reports, strict=True) if not _fits(report, device)}
        for values, launches in recorded.items():
            times[values] = float("inf")
            if launches is not None and values not in failed:
                try:
                    times[values] = seconds_of(launches)
                except RuntimeError:  # too much of what only the device knows of
                    continue

    measure(iter([default]))
    measure(blocks_around(default))
    for values in sorted(times, key=lambda values: times[values])[:_KEPT]:
        measure(warps_and_stages(dict(zip(default, values, strict=True))))
    for values in sorted(times, key=lambda values: times[values]):
        tiles = dict(zip(default, values, strict=True))
        with tuned.overriding({look_up.key: tiles}):
            if times[values] < float("inf") and is_right(problem, operands):
                return {"tiles": tiles, "us": 1e6 * times[values], "default_us": 1e6 * times[tuple(default.values())]}
    return None


def seconds_of(launches: Sequence[Launch]) -> float:
    """The median time of launches one after another, with a cold L2."""
    return 1e-3 * triton.testing.do_bench(lambda: [launch(*one) for one in launches], return_mode="median")


def _launches(
    look_up: tuned.LookUp, tiles: Tiles, problem: Problem, operands: tuple[Any, ...], device: Device
) -> list[Launch] | None:
    try:
        with tuned.overriding({look_up.key: tiles}), recording(device) as launches:
            problem.run(operands)
    except (ArithmeticError, RuntimeError, ValueError):  # a launcher that cannot work with such tiles
        return None
    return launches


def _fits(report: Report | RuntimeError, device: Device) -> bool:
    return isinstance(report, Report) and report.stack + report.local == 0 and report.shared <= device.shared


def blocks_around(tiles: Tiles) -> Iterator[Tiles]:
    """Block sizes of a half, once and twice those given: blocks of products stay at 16 and above."""
    names = [name for name in tiles if not name.startswith("num_")]
    if names == ["kernels"]:
        yield from ({"kernels": number} for number in (1, 2))
        return
    around = [[s for s in (tiles[n] // 2, tiles[n], 2 * tiles[n]) if min(tiles[n], 16) <= s <= _LARGEST] for n in names]
    for blocks in itertools.product(*around):
        yield {**tiles, **dict(zip(names, blocks, strict=True))}


def warps_and_stages(tiles: Tiles) -> Iterator[Tiles]:
    """The same blocks with other numbers of warps and stages; nothing where tiles are but a choice of kernels."""
    if "num_warps" in tiles:
        for warps, stages in itertools.product((4, 8), (1, 2, 3, 4)):
            yield {**tiles, "num_warps": warps, "num_stages": stages}


def is_right(problem: Problem, operands: tuple[Any, ...]) -> bool:
    """Whether results err at most 2.5 times as much as torch in the same dtype and two units, against float64."""
    reference = REFERENCE[problem.op]
    same, oracle = reference(*operands), reference(*_doubled(operands))
    for actual, torchs, want in zip(*map(_tensors, (problem.run(operands), same, oracle)), strict=True):
        allowed = 2.5 * (torchs.double() - want).norm() + 2 * torch.finfo(actual.dtype).eps * want.norm()
        if not (actual.double() - want).norm() <= allowed:
            return False
    return True


def _tensors(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(_doubled, value)) if isinstance(value, (tuple, list)) else value


if __name__ == "__main__":
    sys.exit(main())
