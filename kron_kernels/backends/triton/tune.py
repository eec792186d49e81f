"""Measures tiles on the device that is there and writes them where later calls look them up.

python -m kron_kernels.backends.triton.tune    K8, K21, TQCompressor and balanced shapes in bfloat16
python -m kron_kernels.backends.triton.tune --shape 1024x512,2x4 --dtype fp16 --tokens 4096 --minutes 5

What was measured with the same version of Triton on the same device is not measured again: stopped and started anew, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ... import __version__
from ...compress.files import write_text
from ...schemas import registry
from ...testing.timing import CudaClock
from . import configs
from .configs import Entry
from .launch import Device, Launch, device_of, launch
from .offline import Report, compile_all
from .ops import IMPLEMENTATIONS
from .problems import (
    DTYPES,
    EMBEDDINGS,
    FFNS,
    LAYERS,
    QKVS,
    Layer,
    Problem,
    problems,
    run,
)
from .search import Tools, look_ups, search

NAMES = (*LAYERS, *FFNS, *QKVS, *EMBEDDINGS)
# Against fp64, an error of at most this many times that of torch in the same dtype, and units in the last place.
_TIMES, _UNITS = 2.5, 2.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("tune: error: torch finds no CUDA device to measure on", file=sys.stderr)
        return 2
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    clock = CudaClock()

    def tools(problem: Problem, operands: tuple[Any, ...]) -> Tools:
        device = device_of(torch.empty(0, device="cuda"))
        return Tools(
            device,
            lambda launches: _compile(launches, device),
            lambda launches: clock.median(functools.partial(_start, launches)),
            judge(problem, operands),
        )

    wanted = list(problems(IMPLEMENTATIONS, arguments.names, arguments.dtype, arguments.tokens))
    folder = Path(os.environ.get(configs.VARIABLE, configs.FOLDER)) if arguments.out is None else arguments.out
    device = device_of(torch.empty(0, device="cuda"))
    measured_on = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    done = tune(wanted, "cuda", tools, TunedFile(folder, configs.chip_name(device.arch), measured_on), end)
    return 0 if done else 3


class TunedFile:
    """A chip's file of tuned tiles, written anew after every class."""

    def __init__(self, folder: Path, chip: str, measured_on: Mapping[str, str]) -> None:
        self.path = folder / f"{chip}.json"
        self.entries: dict[str, Entry] = configs.read(self.path) if self.path.is_file() else {}
        self._chip, self._measured_on = chip, dict(measured_on)
        # Times of another device or Triton say nothing here: those classes are measured again, and stand until then.
        self._old = set(self.entries) if self._of_another() else set()

    def has(self, key: str) -> bool:
        return key in self.entries and key not in self._old

    def add(self, key: str, entry: Entry) -> None:
        self.entries[key] = entry
        self._old.discard(key)
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        described = {**self._measured_on, "kron_kernels": __version__, "date": today}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, configs.dumps(self._chip, described, self.entries))

    def _of_another(self) -> bool:
        if not self.path.is_file():
            return False
        data = json.loads(self.path.read_text(encoding="utf-8"))
        return any(data.get(name) != value for name, value in self._measured_on.items())


def tune(
    wanted: Sequence[Problem],
    device: str,
    tools: Callable[[Problem, tuple[Any, ...]], Tools],
    file: TunedFile,
    end: float | None = None,
) -> bool:
    """Search the tiles of every class of the problems; False where ``time.monotonic()`` passed ``end`` before."""
    for number, problem in enumerate(wanted, start=1):
        operands = problem.operands(device)
        found = tools(problem, operands)

        def start(problem: Problem = problem, operands: tuple[Any, ...] = operands) -> object:
            return run(problem, operands, IMPLEMENTATIONS)

        for look_up in look_ups(start, found.device):
            key = look_up.key
            if file.has(key):
                continue
            if end is not None and time.monotonic() > end:
                print(f"the time is over before {key} of {problem.id}; start again to go on", file=sys.stderr)
                return False
            entry = search(look_up, start, found)
            if entry is None:
                print(f"{problem.id}: {key}: no tiles are right, not even the default ones", file=sys.stderr)
                continue
            file.add(key, entry)
            print(f"[{number}/{len(wanted)}] {problem.id}: {key}: {_summary(entry)}", flush=True)
    configs.reload()
    return True


def _summary(entry: Entry) -> str:
    default = "default failed" if entry.default_us is None else f"default {entry.default_us:.1f} us"
    return f"{' '.join(f'{name}={value}' for name, value in entry.tiles.items())}, {entry.us:.1f} us, {default}"


def judge(problem: Problem, operands: tuple[Any, ...]) -> Callable[[], str]:
    """A function that says why the op's result is wrong, "" where it is right, against the reference in float64."""
    reference = registry.REFERENCES[problem.op]
    same = list(_tensors(reference(*operands)))
    oracle = list(_tensors(reference(*_doubled(operands))))

    def wrong() -> str:
        for index, (actual, torchs, want) in enumerate(
            zip(_tensors(run(problem, operands, IMPLEMENTATIONS)), same, oracle, strict=True)
        ):
            unit = torch.finfo(actual.dtype).eps * want.norm().item()
            allowed = _TIMES * (torchs.double() - want).norm().item() + _UNITS * unit
            error = (actual.double() - want).norm().item()
            if not error <= allowed:
                return f"result {index}: error {error:.2e}, allowed {allowed:.2e}"
        return ""

    return wrong


def _tensors(results: Any) -> Iterator[Tensor]:
    yield from (results,) if isinstance(results, Tensor) else results


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(_doubled, value)) if isinstance(value, (tuple, list)) else value


def _start(launches: Sequence[Launch]) -> None:
    for one in launches:
        launch(*one)


def _compile(launches: Sequence[Launch], device: Device) -> list[Report | RuntimeError]:
    return list(compile_all(((one, device) for one in launches), os.cpu_count() or 1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kron_kernels.backends.triton.tune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--name", nargs="+", choices=NAMES, default=None, help="default: all, unless --shape is given")
    parser.add_argument("--shape", nargs="+", default=[], help="products, as m1xn1,m2xn2 or m1xn1,m2xn2,terms")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32768, 4096, 128])
    parser.add_argument("--minutes", type=float, help="after which no new search is started")
    parser.add_argument("--out", type=Path, help="folder of the file (the package's, or that of the environment)")
    arguments = parser.parse_args(argv)
    try:
        for text in arguments.shape:
            LAYERS[text] = Layer.parse(text)
    except ValueError as error:
        parser.error(str(error))
    arguments.names = (*(arguments.name or (() if arguments.shape else NAMES)), *arguments.shape)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
