"""Time and memory of a training step of distillation, by our layers and by stock torch's; to distill-steps.csv.

python -m bench.distill_steps     all-MiniLM-L6's size, 32 x 32 tokens, and BERT-base's, 16 x 128; K8 and K21; float32

A step is that of DistillTrainer on one batch: teacher and student forward, all losses, backward, clipping, AdamW.
``memory_mib`` is the growth of the resident set over three steps at its peak, in a fresh process that has models and
optimiser already: gradients, the optimiser's state, activations and losses. ``error`` is the largest of a loss or of a
parameter's gradient against the same step in float64. The weights are random: cost does not depend on the values.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass

from bench.distill_step_candidates import COMPILED, NAMES, SIZES, TOLERANCE
from bench.harness import KEEP_MEMORY, RETURN_MEMORY, Budget, ResultFile, Row, add_run_options, stamp
from bench.points import measure, missing
from kron_kernels.cli.output import Progress

KEY = ("size", "preset", "variant")
COLUMNS = (
    *("layers", "hidden_size", "batch", "length", "parameters", "status", "reason", "error", "tolerance"),
    *("memory_mib", "rounds", "calls", "time_ms_q10", "time_ms_q50", "time_ms_q90"),
    *("speedup_q10", "speedup_q50", "speedup_q90", "over_matmul_q10", "over_matmul_q50", "over_matmul_q90"),
    *("over_compiled_q10", "over_compiled_q50", "over_compiled_q90"),
)
WORKER = "bench.distill_step_worker"


@dataclass(frozen=True)
class StepPoint:
    """One measurement: everything but the student's layers."""

    size: str
    preset: str

    def key(self) -> Row:
        return asdict(self)

    def columns(self) -> Row:
        """What the size stands for."""
        size = SIZES[self.size]
        config = size.config()
        shape = {"layers": config.num_hidden_layers, "hidden_size": config.hidden_size}
        return {**self.key(), **shape, "batch": size.batch, "length": size.length, "tolerance": TOLERANCE}


def main() -> None:
    arguments = parse()
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "distill-steps.csv", KEY, COLUMNS)
    names = [name for name in NAMES if arguments.compile or name != COMPILED]
    points = list(itertools.starmap(StepPoint, itertools.product(arguments.size, arguments.preset)))
    progress = Progress(every_seconds=0)
    for done, point in enumerate(points):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(points)} jobs; start again to go on")
        progress(done, len(points), f"{point.size}, {point.preset}")
        if missing([point], names, file, current):
            run(point, names, arguments, file, current)
    progress(len(points), len(points), f"done: {file.path}")


def run(point: StepPoint, names: list[str], arguments: argparse.Namespace, file: ResultFile, current: Row) -> None:
    """The memory of each way in a process of its own, then all of them in turn in one."""
    told: Row = {"threads": arguments.threads}
    peaks: dict[str, float] = {}

    def keep_peak(_: StepPoint, result: Row) -> None:
        if result.get("peak") is not None:
            peaks[result["variant"]] = result["peak"] / 2**20

    def store(_: StepPoint, result: Row) -> None:
        file.add([{**point.columns(), **result, "memory_mib": peaks.get(result["variant"]), **current}])

    for name in names:
        measure([point], [name], WORKER, {**told, "kind": "memory"}, keep_peak, RETURN_MEMORY)
    measure([point], names, WORKER, {**told, "kind": "time", "seconds": arguments.seconds}, store, KEEP_MEMORY)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["minilm", "bert-base"])
    parser.add_argument("--preset", nargs="+", default=["K8", "K21"])
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add_run_options(parser, seconds=4)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, little time, nothing compiled")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(size=["smoke"], seconds=0.05, compile=False)
    return arguments


if __name__ == "__main__":
    main()
