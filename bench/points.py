"""Points of the layer and feed-forward benchmarks, and how any points are measured in child processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from bench.harness import KEEP_MEMORY, RETURN_MEMORY, Crash, ResultFile, Row, child
from kron_kernels.cli.bench import DTYPES
from kron_kernels.testing import PEAK, ffn, layers
from kron_kernels.testing.ffn import FfnCase, FfnProblem
from kron_kernels.testing.layers import LayerCase, LayerProblem
from kron_kernels.testing.problem import TOLERANCE

CASES: dict[str, LayerCase | FfnCase] = {**layers.CASES, **ffn.CASES}
COLD_COPIES = 12
POINT_KEY = ("case", "direction", "dtype", "tokens", "weights")
COLUMNS = (
    *("factors", "macs", "saving", "status", "reason", "error", "tolerance", "rounds", "calls"),
    *("time_us_q10", "time_us_q50", "time_us_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
    *("gflops", "peak_gflops", "peak_share"),
)


@dataclass(frozen=True)
class Point:
    """One measurement: everything but the candidate."""

    case: str
    dtype: str
    backward: bool
    copies: int
    tokens: int

    def key(self) -> Row:
        return {
            "case": self.case,
            "direction": "forward+backward" if self.backward else "forward",
            "dtype": self.dtype,
            "tokens": self.tokens,
            "weights": "hot" if self.copies == 1 else "cold",
        }

    def problem(self) -> LayerProblem | FfnProblem:
        case = CASES[self.case]
        rest = (self.tokens, DTYPES[self.dtype], self.backward, self.copies)
        return FfnProblem(case, *rest) if isinstance(case, FfnCase) else LayerProblem(case, *rest)


class Keyed(Protocol):
    """A dataclass with the columns that tell its rows from others."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def key(self) -> Row: ...


KeyedT = TypeVar("KeyedT", bound=Keyed)


def measure(
    points: Sequence[Keyed],
    candidates: Sequence[str] | Callable[[Any], Sequence[str]],
    module: str,
    job: Row,
    store: Callable[[Any, Row], None],
    environment: dict[str, str] = KEEP_MEMORY,
) -> None:
    """Measure points in child processes ``module``; after a crash a new one goes on without the candidate that died.

    ``candidates`` are names, or give a point's. ``store(point, result)`` is called for each result as it comes, and for
    those who crashed; ``job`` is what the child is told besides the points and their candidates.
    """
    names_of = candidates if callable(candidates) else lambda _point: candidates
    left = {index: list(names_of(point)) for index, point in enumerate(points)}
    while left:
        described = [{**asdict(points[index]), "index": index, "candidates": names} for index, names in left.items()]
        try:
            for message in child(module, {**job, "points": described}, environment):
                if "result" in message:
                    store(points[message["point"]], message["result"])
                elif "done" in message:
                    del left[message["done"]]
        except Crash as crash:
            index = min(left)
            print(f"  {crash.starting}: {crash}", file=sys.stderr)
            died = {"variant": crash.starting, "status": "crashed", "reason": str(crash)}
            if crash.starting in left[index]:
                left[index].remove(crash.starting)
                store(points[index], died)
            if crash.starting not in names_of(points[index]) or crash.starting == "dense":
                for name in left.pop(index):
                    store(points[index], {**died, "variant": name})


def missing(
    points: Sequence[KeyedT], candidates: Sequence[str], file: ResultFile, current: Row, column: str = "variant"
) -> list[KeyedT]:
    """The points that lack a result of some candidate, whose names stand in ``column``."""
    return [
        point for point in points if not all(file.has({**point.key(), column: name}, current) for name in candidates)
    ]


def complete(point: Point, result: Row) -> Row:
    """A result with its key, and with the rate it comes to.

    ``peak_gflops`` is the median rate of the square product that took its turns in the same rounds, ``peak_share`` the
    median over the rounds of the share of its rate in the same round.
    """
    case = CASES[point.case]
    row = {**point.key(), "factors": str(case), "tolerance": TOLERANCE[DTYPES[point.dtype]], **result}
    if result["variant"] == PEAK:
        row["gflops"] = row["peak_gflops"]
        return row
    row |= {"macs": case.macs, "saving": case.saving}
    if "time_us_q50" in result:
        dense = row["variant"].startswith("dense") or row["variant"] in ("torch.kron + linear", "PEFT")
        # Forward and backward do the forward's work three times: y, dx, and the gradients of the weights.
        flop = 2 * point.tokens * (case.dense_macs if dense else case.macs) * (3 if point.backward else 1)
        row["gflops"] = flop / result["time_us_q50"] / 1e3
        row["peak_share"] = flop * result["over_peak"] / result["peak_flop"]
    return row


def measure_memory(
    points: Sequence[Point], candidates: Sequence[str], file: ResultFile, job: Row, current: Row
) -> None:
    """Peak memory of forward beyond the output of those points that lack it."""
    wanted = missing(points, ["kron_kernels"], file, current)
    if not wanted:
        return
    described = [{**asdict(point), "index": index, "candidates": candidates} for index, point in enumerate(wanted)]
    try:
        for message in child("bench.worker", {**job, "kind": "memory", "points": described}, RETURN_MEMORY):
            if "result" in message:
                file.add([{**wanted[message["point"]].key(), **mebibytes(message["result"]), **current}])
    except Crash as crash:
        print(f"  memory of {wanted[0].case} {wanted[0].dtype}, {crash.starting}: {crash}", file=sys.stderr)


def memory_file(folder: Path) -> ResultFile:
    """memory.csv of a results folder."""
    columns = ("output_mib", "peak_mib", "extra_mib", "scratch_mib")
    return ResultFile(folder / "memory.csv", ("case", "dtype", "tokens", "variant"), columns)


def mebibytes(result: Row) -> Row:
    """The worker's bytes as MiB; ``extra`` is the peak beyond the output."""
    peak, output, scratch = result["peak"], result["output"], result["scratch"]
    return {
        "variant": result["variant"],
        "output_mib": output / 2**20,
        "peak_mib": None if peak is None else peak / 2**20,
        "extra_mib": None if peak is None else max(0, peak - output) / 2**20,
        "scratch_mib": None if scratch is None else scratch / 2**20,
    }
