"""``kron-kernels distill``: fine-tune a teacher, distil a student on text (stage 1) and on a task (stage 2)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import distill_encoder
from .evaluate import add_task_flags
from .extras import needs_extra
from .output import Progress, add_json_flag, format_table, print_json

if TYPE_CHECKING:
    from ..distill.run_folder import RunResult

_LOSSES = ("embedding", "scores", "ffn", "logits", "supervised")


def add_parser(commands: Any) -> None:
    """Add the ``distill`` command and its stages."""
    parser = commands.add_parser(
        "distill",
        help="train a compressed BERT to do as its teacher does",
        description="Two-stage intermediate-layer distillation of KroneckerBERT. Every run leaves a folder with its "
        "configuration, metrics, curves and model; started again after an interruption it goes on where it was.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{encoder,finetune,pretrain,task}")
    distill_encoder.add_stage(stages)
    finetune = stages.add_parser("finetune", help="train a model on a task, without a teacher")
    finetune.add_argument("student", nargs="?", metavar="MODEL", help="folder or hub name of the model")
    pretrain = stages.add_parser("pretrain", help="stage 1: distil on unlabelled text")
    task = stages.add_parser("task", help="stage 2: distil a fine-tuned teacher on its task")
    for stage in (pretrain, task):
        _add_student_flags(stage)
    pretrain.add_argument("--data", nargs="+", metavar="TEXT", help="text files, folders or hub names")
    pretrain.add_argument("--text", metavar="COLUMN", help="the text in tables (text)")
    pretrain.add_argument("--next-sentence", action="store_true", default=None, help="pairs of segments, for NSP")
    for stage in (finetune, task):
        add_task_flags(stage, required=False)
    for stage in (finetune, pretrain, task):
        _add_run_flags(stage)
        stage.set_defaults(run=run)


def _add_student_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="MODEL", help="folder or hub name of the dense model")
    parser.add_argument("--teacher-precision", metavar="PRECISION", help="of the teacher alone (the student's)")
    students = parser.add_mutually_exclusive_group()
    students.add_argument("--student", metavar="MODEL", help="folder of a KronBert to train")
    students.add_argument("--preset", help="make the student from the teacher: K8, K19 or K21")
    parser.add_argument("--warm-start", metavar="HOW", help="how to make it: plain, data-aware or blockwise (default)")
    for term in _LOSSES:
        parser.add_argument(f"--weight-{term}", type=float, metavar="W", help=f"weight of the {term} term (1)")
    parser.add_argument("--attention", metavar="FORM", help="mse of the scores (default) or kl of the probabilities")
    parser.add_argument("--layers", type=int, metavar="N", help="match N layers drawn at random in each step (all)")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings of the run; flags have the last word")
    for name, kind, what in (
        ("epochs", float, "passes over the data"),
        ("max-steps", int, "stop after so many steps"),
        ("batch-size", int, "sequences a step and process"),
        ("gradient-accumulation", int, "batches a step"),
        ("max-length", int, "tokens a sequence"),
        ("learning-rate", float, "peak of the linear schedule"),
        ("dropout", float, "of the student"),
        ("train-limit", int, "examples to train on at most"),
        ("seed", int, "of everything random"),
        ("eval-steps", int, "evaluate every so many steps (at the end only)"),
        ("save-steps", int, "write a checkpoint every so many steps"),
        ("logging-steps", int, "log every so many steps"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=what)
    parser.add_argument("--precision", help="fp32 (default), bf16 or fp16")
    parser.add_argument("--name", help="of the model, in reports (the preset)")
    parser.add_argument("--variant", help="what is special about the run, in reports")
    parser.add_argument("--resume", action="store_true", default=None, help="insist on a run that exists")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carry out a stage, and print what came of it."""
    # transformers, datasets and torchmetrics take seconds to import: only the command that needs them pays.
    with needs_extra("distill"):
        import datasets
        import transformers
        from accelerate import PartialState

        from ..distill import DistillConfig, run_stage
        from ..distill.config import read_config

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = {} if arguments.config is None else read_config(arguments.config)
    if (stage := settings.get("stage", arguments.stage)) != arguments.stage:
        raise ValueError(f"stage: expected {arguments.stage} or none in {arguments.config}, got {stage!r}")
    config = DistillConfig.from_dict({**settings, **_settings(arguments, settings.get("losses"))})
    # transformers' Trainer prints its logs: stdout is for the result.
    with redirect_stdout(sys.stderr):
        result = run_stage(config, arguments.out, resume=arguments.resume, progress=Progress())
    # A process that just ends may leave another inside the group, whose threads then abort.
    PartialState().destroy_process_group()
    if arguments.json:
        print_json(result.to_dict())
    else:
        _print(result, arguments.out)
    return 0


def _settings(arguments: argparse.Namespace, losses: Any) -> dict[str, Any]:
    """What the flags say, by the names of the configuration."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in ("command", "out", "config", "resume", "json", "run"):
        given.pop(name, None)
    terms = {term: given.pop(f"weight_{term}") for term in _LOSSES if f"weight_{term}" in given}
    terms |= {name: given.pop(name) for name in ("attention", "layers") if name in given}
    # The configuration raises for what is no mapping.
    if terms and isinstance(losses, Mapping | None):
        given["losses"] = {**(losses or {}), **terms}
    return given


def _print(result: RunResult, out: Path) -> None:
    rows = [[name, "-" if value is None else f"{value:.4g}"] for name, value in sorted(result.metrics.items())]
    print(format_table(["metric", "value"], rows))
    memory = "" if result.peak_memory_bytes is None else f", at most {result.peak_memory_bytes / 2**20:,.0f} MiB"
    print(f"\n{result.parameters:,} parameters, {result.steps:,} steps in {result.seconds:,.0f} s{memory}")
    print(f"everything is in {out}")
    if result.score is not None and result.teacher_score:
        share = 100 * result.score / result.teacher_score
        print(f"score {result.score:.2f}, the teacher's {result.teacher_score:.2f}: {share:.1f} % kept")
