"""``kron-kernels compress``: a BERT checkpoint in, a KronBert checkpoint out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .output import Progress, add_json_flag, print_json


def add_parser(commands: Any) -> None:
    """Add the ``compress`` command."""
    parser = commands.add_parser(
        "compress",
        help="compress a BERT checkpoint",
        description="Replace the linear layers and the word embedding of a BERT by factored ones and save it with its "
        "tokenizer and a report. Without fine-tuning or distillation the result is a starting point.",
        epilog="example: kron-kernels compress path/to/bert bert-8x --size 8x --calibrate sentences.txt",
    )
    parser.add_argument("model", help="folder of the checkpoint, or its name on the model hub")
    parser.add_argument("out", type=Path, help="folder to make, with --plan-only file to write")
    shapes = parser.add_mutually_exclusive_group(required=True)
    shapes.add_argument("--size", help="plan ranks for this size, 8x or 21x, on the text of --calibrate")
    shapes.add_argument("--params", dest="size", type=int, metavar="N", help="plan for this number of parameters")
    shapes.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="plan for the smallest size whose similarities of sentences correlate by this, 0.97 say, with the dense "
        "model's before any training",
    )
    shapes.add_argument("--preset", help="factor shapes: K8, K19 or K21")
    shapes.add_argument("--config", type=Path, help="factor shapes: a KronConfig as JSON")
    parser.add_argument("--plan-only", action="store_true", help="write the plan as a configuration for --config")
    parser.add_argument("--max-length", type=int, metavar="N", help="drop position rows beyond N tokens")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="text file, a sentence a line, for a warm start")
    parser.add_argument("--calibrate-lines", type=int, default=2000, metavar="N", help="lines of it to use (2000)")
    parser.add_argument(
        "--warm-start",
        metavar="METHOD",
        help="plain: nearest to the weights; data-aware: to the outputs of the layers on the text (default with "
        "a plan); blockwise: then trained on it block by block, which takes minutes (default with --preset and text)",
    )
    parser.add_argument("--warm-start-steps", type=int, default=300, metavar="N", help="steps a block (300)")
    parser.add_argument("--terms", type=int, metavar="S", help="products to sum in each linear layer")
    parser.add_argument("--weight-dtype", metavar="TYPE", help="store large factors as int8 or int4")
    parser.add_argument("--force", action="store_true", help="replace OUT where it holds a compressed model")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compress, and print what it came to."""
    # transformers takes seconds to import: only the command that needs it pays.
    import transformers

    from ..compress import compress, plan_size
    from ..compress.files import write_text
    from ..compress.report import describe
    from ..compress.target import check_target
    from ..convert.presets import KronConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = arguments.preset
    options: dict[str, Any] = {
        "size": arguments.size,
        "keep": arguments.keep,
        "max_length": arguments.max_length,
        "calibrate_lines": arguments.calibrate_lines,
        "progress": Progress(),
    }
    if arguments.plan_only:
        if arguments.calibrate is None:
            raise ValueError("--plan-only: expected text to plan on (--calibrate), got none")
        if arguments.out.exists() and not arguments.force:
            raise FileExistsError(f"out: {arguments.out} exists; pass --force to replace it")
        plan = plan_size(arguments.model, arguments.calibrate, **options)
        write_text(arguments.out, plan.config.to_json() + "\n")
        if arguments.json:
            print_json({"params": plan.params, "agreement": plan.agreement, "config": plan.config.to_dict()})
        else:
            print(plan, f"{arguments.out}: {plan.params:,} parameters; {describe(plan.agreement)}", sep="\n")
        return 0
    if arguments.config is not None:
        check_target(arguments.out, arguments.force, [arguments.config])
        config = KronConfig.from_json(arguments.config.read_text(encoding="utf-8"))
    report = compress(
        arguments.model,
        arguments.out,
        config,
        calibrate_text=arguments.calibrate,
        warm_start=arguments.warm_start,
        warm_start_steps=arguments.warm_start_steps,
        terms=arguments.terms,
        weight_dtype=arguments.weight_dtype,
        overwrite=arguments.force,
        **options,
    )
    if arguments.json:
        print_json(report.to_dict())
    else:
        print(report)
    return 0
