"""``kron-kernels bench layers`` and ``bench model``: quick timings on this machine, checked before they are timed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from ..testing.machine import describe_machine
from ..testing.problems import CASES, FFN_CASES, Candidate, OpProblem, a_first, b_first, dense_op, kron_op
from ..testing.timing import Result, compare
from .output import Progress, add_json_flag, format_table, print_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_parser(commands: Any) -> None:
    """Add the ``bench`` command with its two subjects."""
    parser = commands.add_parser("bench", help="time layers or a whole encoder against dense torch")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="{layers,model}")
    layers = subjects.add_parser("layers", help="layers and feed-forward blocks of BERT-base", description=__doc__)
    layers.add_argument("--case", action="append", choices=[*CASES, *FFN_CASES], help="may be repeated; default: all")
    layers.add_argument("--tokens", type=_counts, default=[1, 128, 1024], help="rows of x, by comma (1,128,1024)")
    layers.add_argument("--backward", action="store_true", help="time forward and backward together")
    layers.set_defaults(run=_run, rows=_layer_rows, seconds=0.3)
    model = subjects.add_parser("model", help="an encoder of BERT-base's sizes, dense and compressed, random weights")
    model.add_argument("--preset", action="append", help="may be repeated; default: K8 and K21")
    model.add_argument("--batch", type=_counts, default=[1, 8], help="batch sizes, by comma (1,8)")
    model.add_argument("--sequence", type=int, default=128, help="tokens a sequence (128)")
    model.add_argument("--layers", type=int, default=12, help="layers of the encoder (12)")
    model.set_defaults(run=_run, rows=_model_rows, seconds=2.0)
    for subject in (layers, model):
        subject.add_argument("--dtype", choices=DTYPES, default="fp32")
        subject.add_argument("--seconds", type=_positive, default=argparse.SUPPRESS, help="time for each candidate")
        subject.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
        add_json_flag(subject)


def _run(arguments: argparse.Namespace) -> int:
    """Print a table or JSON; 1 when a candidate computed wrongly."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    rows = list(arguments.rows(arguments))
    machine = describe_machine()
    if arguments.json:
        print_json({"machine": machine, "dtype": arguments.dtype, "rows": rows})
    else:
        about = (str(machine[name]) for name in ("cpu", "isa", "threads", "torch"))
        print("{}, {}, {} threads, torch {}; ".format(*about) + arguments.dtype)
        print("speed-up: median over dense in the same round, with its 10 % and 90 % quantiles\n")
        print(format_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))
    return 1 if any(row["status"].startswith("wrong") for row in rows) else 0


def _layer_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = {**CASES, **FFN_CASES}
    jobs = [(name, tokens) for name in arguments.case or cases for tokens in arguments.tokens]
    progress = Progress()
    for done, (name, tokens) in enumerate(jobs):
        progress(done, len(jobs), f"{name}, {tokens} tokens")
        case = cases[name]
        candidates = [
            Candidate("dense", dense_op(case.op), ("weight", "bias")),
            Candidate("kron_kernels", kron_op(case.op)),
        ]
        if case.op == "kron_matmul":
            candidates += [Candidate("matmul B first", b_first), Candidate("matmul A first", a_first)]
        problem = OpProblem(case, tokens, DTYPES[arguments.dtype], arguments.backward)
        saved = f"{case.dense_macs / case.macs:.1f}x"
        for result in compare(problem, candidates, seconds=arguments.seconds):
            yield {"case": name, "factors": str(case), "tokens": tokens, "operations saved": saved, **_row(result)}


def _model_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    # Imports transformers, which takes seconds.
    from ..testing.encoder import EncoderProblem, as_it_is, encoders, inference_form, random_ids

    progress = Progress()
    progress(0, len(arguments.batch) + 1, "making the models")
    presets = arguments.preset or ["K8", "K21"]
    models = encoders(presets, DTYPES[arguments.dtype], num_hidden_layers=arguments.layers)
    candidates = [as_it_is(name, model) for name, model in models.items()]
    candidates += [inference_form(f"{name}, inference form", models[name]) for name in presets]
    for done, batch in enumerate(arguments.batch, start=1):
        progress(done, len(arguments.batch) + 1, f"batch {batch} x {arguments.sequence} tokens")
        problem = EncoderProblem(random_ids(models["dense"], batch, arguments.sequence))
        for result in compare(problem, candidates, seconds=arguments.seconds):
            parameters = sum(each.numel() for each in models[result.name.partition(",")[0]].parameters())
            yield {"batch": batch, "sequence": arguments.sequence, "parameters": parameters, **_row(result)}


def _row(result: Result) -> dict[str, Any]:
    timing = result.timing
    return {
        "variant": result.name,
        "status": f"{result.status}: {result.reason}" if result.reason else result.status,
        "error": result.error,
        "us": timing and round(timing.seconds.q50 * 1e6, 1),
        **{name: timing and round(getattr(timing.speedup, q), 2) for name, q in _SPEEDUPS.items()},
    }


_SPEEDUPS = {"speed-up": "q50", "q10": "q10", "q90": "q90"}


def _cell(value: object) -> str:
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        return f"{value:.1e}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected positive integers separated by commas, got {text!r}")
    return [int(part) for part in parts]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value
