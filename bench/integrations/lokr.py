"""Time and memory of a LoKr adapter on a frozen linear layer: PEFT, LyCORIS, dense and ours; to integrations-lokr.csv.

python -m bench.integrations.lokr           all of it; killed and started again it goes on where it was
python -m bench.integrations.lokr --reach   4096 tokens, forward and backward: what has a reach

Two figures each: the layer with its adapter ("layer"), and what the adapter adds to a result that is there
("adapter"). Forward and backward give the gradients of x and of what is trained. Speed-ups are over dense, full
fine-tuning of the same layer; ``over_peft`` and ``over_base`` are over PEFT as installed and over the frozen layer
alone. ``ceiling`` is how many times faster than PEFT the multiply-adds allow. ``peak_mib`` is the growth of the
resident set over one call, its results included, in a fresh process; ``adapter_mib`` what that is beyond the frozen
layer's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from bench.harness import KEEP_MEMORY, RETURN_MEMORY, Budget, ResultFile, Row, add_run_options, read_rows, stamp
from bench.integrations.lokr_ways import BASE, OURS, PARTS, PEFT, LokrCase, ceiling, macs
from bench.points import measure, missing
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress
from kron_kernels.testing.problem import TOLERANCE
from kron_kernels.testing.tables import markdown

KEY = ("layer", "adapter", "tokens", "dtype", "direction", "part", "variant")
COLUMNS = (
    *("factors", "macs", "ceiling", "status", "reason", "error", "tolerance", "peak_mib", "adapter_mib"),
    *("rounds", "calls", "time_ms_q10", "time_ms_q50", "time_ms_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
    *("over_peft_q10", "over_peft_q50", "over_peft_q90", "over_base_q10", "over_base_q50", "over_base_q90"),
)
WORKER = "bench.integrations.lokr_worker"
LAYERS = ("3072-3072", "3072-12288", "4096-14336")
TOKENS = (4096, 512)
RANKS = (0, 16)


@dataclass(frozen=True)
class LokrPoint:
    """One measurement: everything but the way."""

    n: int
    m: int
    rank: int
    tokens: int
    dtype: str
    backward: bool
    part: str

    def key(self) -> Row:
        return {
            "layer": f"{self.n}-{self.m}",
            "adapter": f"rank {self.rank}" if self.rank else "full",
            "tokens": self.tokens,
            "dtype": self.dtype,
            "direction": "forward+backward" if self.backward else "forward",
            "part": self.part,
        }

    @property
    def case(self) -> LokrCase:
        return LokrCase(self.n, self.m, self.rank)

    def complete(self, result: Row, peaks: dict[str, float]) -> Row:
        """A result with its key, operations and memory; ``peaks`` are MiB by the ways' names."""
        name = result["variant"]
        (m1, n1), (m2, n2) = self.case.shapes
        row = {
            **self.key(),
            "factors": f"{m1}x{n1} (x) {m2}x{n2}",
            "macs": macs(self.case, self.part, name, self.backward),
            "ceiling": ceiling(self.case, self.part, self.backward),
            "tolerance": TOLERANCE[DTYPES[self.dtype]],
            "peak_mib": peaks.get(name),
            **result,
        }
        if name in peaks and BASE in peaks:
            row["adapter_mib"] = peaks[name] - peaks[BASE]
        return row


def main() -> None:
    arguments = parse()
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "integrations-lokr.csv", KEY, COLUMNS)
    points = list(plan(arguments))
    progress = Progress(every_seconds=0)
    for done, point in enumerate(points):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(points)} jobs; start again to go on")
        progress(done, len(points), " ".join(str(value) for value in point.key().values()))
        if missing([point], PARTS[point.part], file, current):
            run(point, arguments, file, current)
    progress(len(points), len(points), f"done: {file.path}")
    print(summary(read_rows(file.path)))


def plan(arguments: argparse.Namespace) -> Iterator[LokrPoint]:
    """The points, each one job: what has a reach comes first."""
    for dtype, tokens, backward in itertools.product(arguments.dtype, arguments.tokens, (True, False)):
        if backward or not arguments.reach:
            for layer, rank, part in itertools.product(arguments.layer, arguments.rank, PARTS):
                n, m = map(int, layer.split("-"))
                yield LokrPoint(n, m, rank, tokens, dtype, backward, part)


def run(point: LokrPoint, arguments: argparse.Namespace, file: ResultFile, current: Row) -> None:
    """The memory of each way in a process of its own, then all of them in turn in one."""
    told: Row = {"threads": arguments.threads}
    names = PARTS[point.part]
    peaks: dict[str, float] = {}

    def keep_peak(_: LokrPoint, result: Row) -> None:
        if result.get("peak") is not None:
            peaks[result["variant"]] = result["peak"] / 2**20

    def store(_: LokrPoint, result: Row) -> None:
        file.add([{**point.complete(result, peaks), **current}])

    for name in names if arguments.memory else ():
        measure([point], [name], WORKER, {**told, "kind": "memory"}, keep_peak, RETURN_MEMORY)
    measure([point], names, WORKER, {**told, "kind": "time", "seconds": arguments.seconds}, store, KEEP_MEMORY)


def summary(rows: list[Row]) -> str:
    """A Markdown table of ours over PEFT, with what the operations allow and both peaks of memory."""
    columns = [name for name in KEY if name != "variant"]
    by_point = {tuple(row[name] for name in columns): {} for row in rows}
    for row in rows:
        by_point[tuple(row[name] for name in columns)][row["variant"]] = row
    lines = []
    for key, found in by_point.items():
        ours = found.get(OURS, {})
        figures = [ours.get(name, "") for name in ("status", "over_peft_q50", "ceiling", "over_base_q50", "peak_mib")]
        lines.append([*key, *figures, found.get(PEFT, {}).get("peak_mib", "")])
    headers = (*columns, "status", "times faster than PEFT", "ceiling", "than the layer alone", "peak MiB", "PEFT's")
    return markdown(headers, lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", nargs="+", default=list(LAYERS), help="n-m, both multiples of 8")
    parser.add_argument("--rank", nargs="+", type=int, default=list(RANKS), help="of the second factor; 0: full")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--reach", action="store_true", help="4096 tokens, forward and backward alone")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time alone")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, little time, no memory: does it work?")
    add_run_options(parser, seconds=2)
    arguments = parser.parse_args()
    if arguments.reach:
        arguments.tokens = [4096]
    if arguments.quick:
        vars(arguments).update(layer=["64-128"], rank=[2], tokens=[16], seconds=0.02, memory=False)
    return arguments


if __name__ == "__main__":
    main()
