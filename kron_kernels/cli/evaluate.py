"""``kron-kernels evaluate``: the score of a model on a task."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import needs_extra
from .output import Progress, add_json_flag, format_table, print_json

if TYPE_CHECKING:
    from ..distill.data import Task


def add_parser(commands: Any) -> None:
    """Add the ``evaluate`` command."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model on a task",
        description="Score a BERT or KronBert with a task's head on GLUE, SQuAD or files of your own. "
        "Scores are in percent.",
    )
    parser.add_argument("model", help="folder of the model, or its name on the model hub")
    add_task_flags(parser)
    parser.add_argument(
        "--similarity",
        action="store_true",
        help="score a sentence encoder without a head: the cosine of both texts' vectors against the labels (stsb)",
    )
    parser.add_argument("--split", default="validation", help="validation, validation_mismatched, train or test")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="examples at a time (32)")
    parser.add_argument("--max-length", type=int, metavar="N", help="most tokens of an input (128; SQuAD 384)")
    parser.add_argument("--device", help="where to run: cpu, cuda, ... (cuda if there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def add_task_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The flags that tell a task and its data."""
    parser.add_argument("--task", required=required, help="GLUE task, squad, squad_v2, or custom: files of your own")
    parser.add_argument("--data", required=required, help="folder with train.* and dev.*, a file, or a hub name")
    own = parser.add_argument_group("columns of a custom task")
    own.add_argument("--text", metavar="COLUMN", help="the text (text)")
    own.add_argument("--text-pair", metavar="COLUMN", help="the second text, if there is one")
    own.add_argument("--label", metavar="COLUMN", help="the label (label)")
    own.add_argument(
        "--regression", action="store_true", default=None, help="labels are numbers to predict, not classes"
    )


def task_of(arguments: argparse.Namespace) -> Task:
    """The task that the flags of :func:`add_task_flags` tell; ValueError where they do not go together."""
    from ..distill.data import task_from

    columns = {name: getattr(arguments, name) for name in ("text", "text_pair", "label")}
    given = {name: column for name, column in columns.items() if column is not None}
    return task_from(arguments.task, given, bool(arguments.regression))


def run(arguments: argparse.Namespace) -> int:
    """Score, and print what it came to."""
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise FileNotFoundError(f"out: expected a file in a folder that exists, got {arguments.out}")
    # transformers, datasets and torchmetrics take seconds to import: only the command that needs them pays.
    with needs_extra("distill"):
        import datasets
        import transformers

        from ..distill.evaluate import evaluate
        from ..distill.similarity import evaluate_similarity

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    which = (arguments.model, task_of(arguments), arguments.data, arguments.split)
    sizes = {"batch_size": arguments.batch_size, "max_length": arguments.max_length}
    if arguments.similarity:
        result = evaluate_similarity(*which, **sizes)
    else:
        result = evaluate(*which, **sizes, device=arguments.device, progress=Progress())
    document = {"model": arguments.model, "data": arguments.data, **result.to_dict()}
    if arguments.out is not None:
        partial = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, arguments.out)
        finally:
            partial.unlink(missing_ok=True)
    if arguments.json:
        print_json(document)
    else:
        rows = [(name, f"{value:.2f}", "*" if name == result.main else "") for name, value in result.metrics.items()]
        print(format_table(("metric", "percent", "score"), rows))
        print(f"\n{result.task}, {result.split}: {result.examples:,} examples in {result.seconds:.1f} s")
    return 0
