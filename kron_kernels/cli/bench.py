"""``kron-kernels bench layers`` and ``bench model``: quick timings on this machine, checked before they are timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..testing import PEAK, Timing, describe_machine, gemm_peak
from ..testing.compare import Result, compare
from ..testing.layers import CASES, STOCK, LayerCase, LayerProblem
from .output import Progress, add_json_flag, format_table, print_json

if TYPE_CHECKING:
    from torch import nn

    from ..testing.encoder import EncoderResult

    Encoders = Callable[..., dict[str, nn.Module]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_parser(commands: Any) -> None:
    """Add the ``bench`` command with its two subjects."""
    parser = commands.add_parser("bench", help="time layers or a whole encoder against dense torch")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="{layers,model}")

    layers = subjects.add_parser(
        "layers", help="single layers of BERT-base: dense, materialised, two products, ours", description=__doc__
    )
    layers.add_argument("--case", action="append", choices=sorted(CASES), help="may be repeated; default: all")
    layers.add_argument("--tokens", type=_counts, default=[1, 128, 1024], help="rows of x, by comma (1,128,1024)")
    layers.add_argument("--backward", action="store_true", help="time forward and backward together")
    layers.set_defaults(run=run_layers)

    model = subjects.add_parser(
        "model",
        help="a BERT-base-sized encoder, dense and compressed",
        description="BERT-base's configuration with random weights: what it costs does not depend on the values.",
    )
    model.add_argument("--preset", action="append", help="may be repeated; default: K8 and K21")
    model.add_argument("--batch", type=_counts, default=[1, 8], help="batch sizes, by comma (1,8)")
    model.add_argument("--sequence", type=int, default=128, help="tokens a sequence (128)")
    model.add_argument("--layers", type=int, default=12, help="layers of the encoder (12)")
    model.add_argument("--profile", action="store_true", help="show the time of each part of the encoder")
    model.set_defaults(run=run_model)

    for subject, seconds in ((layers, 0.3), (model, 2.0)):
        subject.add_argument("--dtype", choices=DTYPES, default="fp32")
        subject.add_argument("--seconds", type=_seconds, default=seconds, help=f"time for each variant ({seconds})")
        subject.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
        add_json_flag(subject)


def run_layers(arguments: argparse.Namespace) -> int:
    """Time the layers; 1 when any way computed wrongly."""
    _set_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    cases = [CASES[name] for name in arguments.case or CASES]
    jobs = [(case, tokens) for case in cases for tokens in arguments.tokens]
    progress, rows, wrong = Progress(), [], False
    peak = gemm_peak(dtype)
    for done, (case, tokens) in enumerate(jobs):
        progress(done, len(jobs), f"{case.name}, {tokens} tokens")
        problem = LayerProblem(case, tokens, dtype, arguments.backward)
        results = compare(problem, STOCK, seconds=arguments.seconds, beside=[peak.variant], over=[PEAK])
        # Forward and backward together do the forward's work three times: y, dx, and both factors' gradients.
        flop = 2 * case.macs * tokens * (3 if arguments.backward else 1)
        rows += [_layer_row(case, tokens, flop / peak.flop, result) for result in results]
        wrong |= any(result.status == "wrong" for result in results)
    progress(len(jobs), len(jobs), "done")
    title = f"{arguments.dtype}, {'forward + backward' if arguments.backward else 'forward'}"
    _print(arguments.json, title, rows, {"gemm_peak": peak.label})
    return 1 if wrong else 0


def run_model(arguments: argparse.Namespace) -> int:
    """Time the encoder; 1 when any model computed wrongly."""
    # Imports transformers, which takes seconds.
    from ..testing.encoder import compare_encoders, encoders

    _set_threads(arguments.threads)
    presets = arguments.preset or ["K8", "K21"]
    if arguments.profile:
        return _run_profile(arguments, presets, encoders)
    progress, rows = Progress(), []
    total = len(arguments.batch) + 1
    progress(0, total, "making the models")
    models = encoders(presets, DTYPES[arguments.dtype], num_hidden_layers=arguments.layers)
    for done, batch in enumerate(arguments.batch, start=1):
        progress(done, total, f"batch {batch} x {arguments.sequence} tokens")
        results = compare_encoders(models, batch, arguments.sequence, seconds=arguments.seconds)
        rows += [_model_row(batch, arguments.sequence, result) for result in results]
    title = f"BERT-base sizes, {arguments.layers} layers, random weights, {arguments.dtype}"
    _print(arguments.json, title, rows, {})
    return 1 if any(row["status"] != "ok" for row in rows) else 0


def _run_profile(arguments: argparse.Namespace, presets: list[str], encoders: Encoders) -> int:
    """Where the time of each model goes, by part."""
    from ..testing.encoder import random_ids
    from ..testing.profile import profile_forward

    progress, rows = Progress(), []
    models = encoders(presets, DTYPES[arguments.dtype], num_hidden_layers=arguments.layers)
    jobs = [(batch, name) for batch in arguments.batch for name in models]
    for done, (batch, name) in enumerate(jobs):
        progress(done, len(jobs), f"{name}, batch {batch} x {arguments.sequence} tokens")
        ids = random_ids(models[name], batch, arguments.sequence)
        profile = profile_forward(models[name], ids, seconds=arguments.seconds)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "sequence": arguments.sequence,
                **{part: round(seconds * 1e3, 3) for part, seconds in profile.parts.items()},
                "sum": round(sum(profile.parts.values()) * 1e3, 3),
                "untraced": round(profile.untraced * 1e3, 3),
                "gap": f"{profile.gap:+.1%}",
            }
        )
    progress(len(jobs), len(jobs), "done")
    title = f"BERT-base sizes, {arguments.layers} layers, random weights, {arguments.dtype}; milliseconds by part"
    note = "parts: medians of traced forwards; gap: their sum over the untraced median, which is the cost of tracing"
    _print(arguments.json, title, rows, {}, note)
    return 0


def _layer_row(case: LayerCase, tokens: int, peak_calls: float, result: Result) -> dict[str, Any]:
    """``peak_calls``: how many calls of the square product do as many operations as our kernel."""
    row = {
        "case": case.name,
        "factors": str(case),
        "tokens": tokens,
        "variant": result.name,
        "macs saved": f"{case.saving:.1f}x",
        "status": result.status if not result.reason else f"{result.status}: {result.reason}",
        "error": result.error,
        **_times(result.timing),
    }
    if result.over and result.name == "kron_kernels":
        row["of gemm peak"] = f"{peak_calls * result.over[PEAK].q50:.0%}"
    return row


def _model_row(batch: int, sequence: int, result: EncoderResult) -> dict[str, Any]:
    return {
        "model": result.name,
        "parameters": result.parameters,
        "batch": batch,
        "sequence": sequence,
        "status": "ok" if result.timing else f"wrong: {result.reason}",
        "error": result.error,
        **_times(result.timing),
    }


def _times(timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {"us": None, "speed-up": None, "q10": None, "q90": None}
    return {
        "us": round(timing.seconds.q50 * 1e6, 1),
        "speed-up": round(timing.speedup.q50, 2),
        "q10": round(timing.speedup.q10, 2),
        "q90": round(timing.speedup.q90, 2),
    }


SPEEDUP_NOTE = "speed-up: median over dense in the same round, with its 10 % and 90 % quantiles"


def _print(
    as_json: bool, title: str, rows: list[dict[str, Any]], extra: dict[str, Any], note: str = SPEEDUP_NOTE
) -> None:
    machine = describe_machine()
    if as_json:
        print_json({"title": title, "machine": machine, **extra, "rows": rows})
        return
    print(f"{title}; {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}")
    print(f"{note}\n")
    headers = list(dict.fromkeys(key for row in rows for key in row))
    print(format_table(headers, [[_cell(row.get(header)) for header in headers] for row in rows]))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    torch.set_num_threads(threads)


def _counts(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers separated by commas, got {text!r}")
    return values


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value
