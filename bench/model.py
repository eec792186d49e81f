"""Time a BERT-base-sized encoder, dense, compressed and made faster in other ways; results to model.csv.

python -m bench.model             all of it; killed and started again it goes on where it was
python -m bench.model --reach     only the input shapes that a reach was set for

The weights are random: cost does not depend on the values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.encoder_candidates import names, sweep_names
from bench.harness import KEEP_MEMORY, RETURN_MEMORY, Budget, ResultFile, Row, add_run_options, stamp
from bench.points import measure, missing
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress

KEY = ("dtype", "batch", "sequence", "layers", "model")
COLUMNS = (
    *("parameters", "status", "reason", "error", "tolerance", "rounds", "calls"),
    *("time_ms_q10", "time_ms_q50", "time_ms_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
    *("over_compiled_q10", "over_compiled_q50", "over_compiled_q90", "forward_peak_mib"),
)
# (batch, sequence): those of the reach, and those of the plots.
REACH_SHAPES = ((1, 16), (1, 128), (8, 128))
SWEEP_SHAPES = ((1, 32), (1, 64), (1, 256), (1, 512), (2, 128), (4, 128), (16, 128))
# The sweep is for plots, and takes half the time a point.
SWEEP_SHARE = 0.5


@dataclass(frozen=True)
class EncoderPoint:
    """One measurement: everything but the model."""

    dtype: str
    batch: int
    sequence: int
    layers: int

    def key(self) -> Row:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """Points of one dtype, measured by one child process."""

    points: list[EncoderPoint]
    candidates: tuple[str, ...]
    seconds: float
    memory: bool


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "model.csv", KEY, COLUMNS)
    jobs = list(plan(arguments))
    progress = Progress(every_seconds=0)
    for done, job in enumerate(jobs):
        if budget.spent():
            sys.exit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        progress(done, len(jobs), f"{job.points[0].dtype}, {len(job.points)} input shapes")
        run(job, arguments, file, current)
    progress(len(jobs), len(jobs), f"done: {file.path}")


def run(job: Job, arguments: argparse.Namespace, file: ResultFile, current: Row) -> None:
    """Measure what the file lacks of a job, the memory of forward first."""
    points = missing(job.points, job.candidates, file, current, "model")
    told: Row = {"threads": arguments.threads, "presets": arguments.preset, "sizes": arguments.sizes}
    peaks: dict[tuple[EncoderPoint, str], float] = {}

    def keep_peak(point: EncoderPoint, result: Row) -> None:
        if result.get("peak") is not None:
            peaks[point, result["variant"]] = result["peak"] / 2**20

    def store(point: EncoderPoint, result: Row) -> None:
        name = result["variant"]
        row = {**point.key(), "model": name, **result, "forward_peak_mib": peaks.get((point, name)), **current}
        file.add([row])

    if job.memory and points:
        measure(
            points,
            ("dense", *arguments.preset),
            "bench.model_worker",
            {**told, "kind": "memory"},
            keep_peak,
            RETURN_MEMORY,
        )
    measure(
        points,
        job.candidates,
        "bench.model_worker",
        {**told, "kind": "time", "seconds": job.seconds},
        store,
        KEEP_MEMORY,
    )


def plan(arguments: argparse.Namespace) -> Iterator[Job]:
    """What has a reach comes first."""

    def points(dtype: str, shapes: tuple[tuple[int, int], ...]) -> list[EncoderPoint]:
        return [EncoderPoint(dtype, batch, sequence, arguments.layers) for batch, sequence in shapes]

    shapes = tuple(arguments.shape)
    for dtype in arguments.dtype:
        every = [name for name in names(arguments.preset) if arguments.compile or "compiled" not in name]
        yield Job(points(dtype, shapes), tuple(every), arguments.seconds, memory=True)
    for dtype in () if arguments.reach else arguments.dtype:
        some = [name for name in sweep_names(arguments.preset, dtype) if arguments.compile or "compiled" not in name]
        yield Job(points(dtype, SWEEP_SHAPES), tuple(some), SWEEP_SHARE * arguments.seconds, memory=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["K8", "K21"])
    parser.add_argument(
        "--shape", nargs="+", type=shape, default=list(REACH_SHAPES), help="batch x sequence (1x16 1x128 8x128)"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--reach", action="store_true", help="leave the sweep for the plots out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add_run_options(parser, seconds=1.5)
    parser.add_argument("--smoke", action="store_true", help="one layer, one shape, float32, short times")
    parser.set_defaults(sizes={})
    arguments = parser.parse_args()
    if arguments.smoke:
        smoke: dict[str, Any] = {"layers": 1, "shape": [(1, 128)], "dtype": ["fp32"], "seconds": 0.1}
        vars(arguments).update(smoke, reach=True, compile=False)
    return arguments


def shape(text: str) -> tuple[int, int]:
    batch, found, sequence = text.partition("x")
    if not (found and batch.isdigit() and sequence.isdigit() and int(batch) > 0 and int(sequence) > 0):
        raise argparse.ArgumentTypeError(f"expected BATCHxSEQUENCE, got {text!r}")
    return int(batch), int(sequence)


if __name__ == "__main__":
    main()
