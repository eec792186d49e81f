"""Peak memory of a whole process that loads an encoder from disk and runs it; results to process.csv.

python -m bench.process_memory     dense, K8 and K21, 128 tokens, a fresh process for each

The compressed models are loaded from their checkpoints by transformers, as exported packages by torch alone ("K8,
package"), and from their checkpoints by ``load_package``, without transformers too ("K8, folder").
The allocator is left as a user has it. ``imported_mib`` is the process with its imports alone; ``model_mib`` is what
loading and running the model add to it at the peak.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

from bench.harness import Budget, Crash, ResultFile, Row, add_run_options, child, stamp
from kron_kernels.cli.bench import DTYPES
from kron_kernels.cli.output import Progress

KEY = ("dtype", "batch", "sequence", "layers", "model")
COLUMNS = ("status", "reason", "peak_mib", "imported_mib", "model_mib", "checkpoint_mib")
CALLS = 3
# Loaded by kron_kernels.runtime.load_package: what "kron-kernels export" made, or the checkpoint itself.
PACKAGE, FOLDER = ", package", ", folder"
QUIET = {"TQDM_DISABLE": "1"}


def main() -> None:
    arguments = parse()
    current = stamp(arguments.threads)
    budget = Budget(arguments.budget)
    file = ResultFile(arguments.out / "process.csv", KEY, COLUMNS)
    models = ["dense", *(preset + form for preset in arguments.preset for form in ("", PACKAGE, FOLDER))]
    jobs = list(itertools.product(arguments.dtype, arguments.batch, models))
    progress = Progress(every_seconds=0)
    for done, (dtype, batch, model) in enumerate(jobs):
        if budget.spent():
            raise SystemExit(f"the budget is spent after {done} of {len(jobs)} jobs; start again to go on")
        progress(done, len(jobs), f"{model}, {dtype}, {batch} x {arguments.sequence}")
        key = {"dtype": dtype, "batch": batch, "sequence": arguments.sequence, "layers": arguments.layers}
        key["model"] = model
        if not file.has(key, current):
            file.add([{**key, **measure_process(key, arguments), **current}])
    progress(len(jobs), len(jobs), f"done: {file.path}")


def measure_process(key: Row, arguments: argparse.Namespace) -> Row:
    """Write a checkpoint in one process, load and run it in another; MiB."""
    with tempfile.TemporaryDirectory() as folder:
        dtype = str(DTYPES[key["dtype"]]).removeprefix("torch.")
        job = {**key, "dtype": dtype, "folder": folder, "threads": arguments.threads, "calls": CALLS}
        job["model"] = key["model"].removesuffix(PACKAGE).removesuffix(FOLDER)
        packaged, plain = key["model"].endswith(PACKAGE), key["model"] == job["model"]
        job["package"] = f"{folder}/model.pt2" if packaged else folder
        try:
            list(child("bench.process_worker", {**job, "kind": "save", "sizes": arguments.sizes}, QUIET))
            if packaged:
                list(child("bench.process_worker", {**job, "kind": "export"}, QUIET))
            (found,) = child("bench.process_worker", {**job, "kind": "run" if plain else "run package"}, QUIET)
        except Crash as crash:
            return {"status": "crashed", "reason": str(crash)}
        size = sum(path.stat().st_size for path in Path(folder).glob("*.pt2" if packaged else "*.safetensors"))
    return {
        "status": "ok",
        "peak_mib": found["peak"] / 2**20,
        "imported_mib": found["imported"] / 2**20,
        "model_mib": (found["peak"] - found["imported"]) / 2**20,
        "checkpoint_mib": size / 2**20,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["K8", "K21"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add_run_options(parser)
    parser.add_argument("--smoke", action="store_true", help="one layer, float32")
    parser.set_defaults(sizes={})
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(layers=1, dtype=["fp32"])
    return arguments


if __name__ == "__main__":
    main()
