"""Layers of KnGPT2 and TQCompressor, and text from GPT-2 small converted by their presets; to integrations-gpt2.csv.

python -m bench.integrations.gpt2            all of it; killed and started again it goes on where it was

Layers, float32: the two einsums of published code in both orders, dense F.linear and ours; 1, 128 and 1024 tokens
forward, 1024 forward and backward. ``speedup`` is over dense, ``over_b_first`` and ``over_a_first`` over the einsums,
``saving`` how many times fewer multiply-adds than dense the better order has. Text: random models of GPT-2 small's
size, batch 1, a prompt of 32 tokens and 32 new ones with the cache; ``tokens_per_second`` counts the new ones over the
whole call. Every way is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from bench.harness import Budget, ResultFile, Row, add_run_options, stamp
from bench.integrations.gpt2_ways import CASES, DENSE, LAYER_WAYS
from bench.points import measure, missing
from kron_kernels.cli.output import Progress

KEY = ("case", "direction", "tokens", "variant")
COLUMNS = (
    *("factors", "macs", "saving", "status", "reason", "error", "rounds", "calls"),
    *("time_ms_q10", "time_ms_q50", "time_ms_q90", "speedup_q10", "speedup_q50", "speedup_q90"),
    *("over_b_first_q10", "over_b_first_q50", "over_b_first_q90"),
    *("over_a_first_q10", "over_a_first_q50", "over_a_first_q90", "tokens_per_second"),
)
WORKER = "bench.integrations.gpt2_worker"
TEXT = "gpt2-small"
TEXT_WAYS = (DENSE, "KnGPT2", "TQCompressor", "TQCompressor-QKV")
SMOKE_TEXT = "gpt2-smoke"
SMOKE_SIZES = {"vocab_size": 60, "n_embd": 48, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Gpt2Point:
    """One measurement: everything but the way. ``prompt`` is 0 for a layer."""

    case: str
    tokens: int
    backward: bool = False
    prompt: int = 0

    def key(self) -> Row:
        direction = "generation" if self.prompt else "forward+backward" if self.backward else "forward"
        return {"case": self.case, "direction": direction, "tokens": self.tokens}

    def complete(self, result: Row) -> Row:
        """A result with its key and what the case stands for."""
        row = {**self.key(), **result}
        if self.prompt:
            if "time_ms_q50" in row:
                row["tokens_per_second"] = self.tokens / row["time_ms_q50"] * 1e3
            return row
        case = CASES[self.case]
        macs = case.dense_macs if row["variant"] == DENSE else case.macs
        return {**row, "factors": str(case), "macs": macs, "saving": case.dense_macs / case.macs}


def main() -> None:
    arguments = parse()
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "integrations-gpt2.csv", KEY, COLUMNS)
    job: Row = {"threads": arguments.threads, "seconds": arguments.seconds, "sizes": arguments.sizes}
    points = all_points(arguments.case)
    progress = Progress(every_seconds=0)
    for done, point in enumerate(points):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(points)} jobs; start again to go on")
        progress(done, len(points), " ".join(str(value) for value in point.key().values()))
        names = TEXT_WAYS if point.prompt else LAYER_WAYS
        if missing([point], names, file, current):
            measure(
                [point], names, WORKER, job, lambda point, result: file.add([{**point.complete(result), **current}])
            )
    progress(len(points), len(points), f"done: {file.path}")


def all_points(cases: list[str]) -> list[Gpt2Point]:
    """The points of these cases."""
    points = []
    for case in cases:
        if case in (TEXT, SMOKE_TEXT):
            points.append(Gpt2Point(case, 32, prompt=32))
        else:
            points += [Gpt2Point(case, tokens) for tokens in (1, 128, 1024)] + [Gpt2Point(case, 1024, backward=True)]
    return points


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*(case for case in CASES if case != "smoke"), TEXT]
    parser.add_argument("--case", nargs="+", choices=known, default=known)
    add_run_options(parser, seconds=1)
    parser.add_argument("--smoke", action="store_true", help="a tiny layer and a tiny model, little time")
    arguments = parser.parse_args()
    arguments.sizes = {}
    if arguments.smoke:
        vars(arguments).update(case=["smoke", SMOKE_TEXT], seconds=0.01, sizes=SMOKE_SIZES)
    return arguments


if __name__ == "__main__":
    main()
