"""``kron-kernels compress``: a BERT checkpoint in, a KronBert checkpoint out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Progress, add_json_flag, format_table, print_json

if TYPE_CHECKING:
    from ..compress.pipeline import CompressReport


def add_parser(commands: Any) -> None:
    """Add the ``compress`` command."""
    parser = commands.add_parser(
        "compress",
        help="compress a BERT checkpoint",
        description="Replace the linear layers and the word embedding of a BERT by Kronecker products and save it "
        "with its tokenizer and a report. Without fine-tuning or distillation the result is a starting point.",
    )
    parser.add_argument("model", help="folder of the checkpoint, or its name on the model hub")
    parser.add_argument("out", type=Path, help="folder to make")
    shapes = parser.add_mutually_exclusive_group(required=True)
    shapes.add_argument("--preset", help="factor shapes: K8, K19 or K21")
    shapes.add_argument("--config", type=Path, help="factor shapes: a KronConfig as JSON")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="text file, a sentence a line, for a warm start")
    parser.add_argument("--calibrate-lines", type=int, default=2000, metavar="N", help="lines of it to use (2000)")
    parser.add_argument(
        "--warm-start",
        metavar="METHOD",
        help="plain: nearest to the weights; data-aware: to the outputs of the layers on the text; blockwise: then "
        "trained on it block by block, which is best and takes minutes (default with --calibrate)",
    )
    parser.add_argument("--warm-start-steps", type=int, default=300, metavar="N", help="steps a block (300)")
    parser.add_argument("--terms", type=int, metavar="S", help="products to sum in each linear layer")
    parser.add_argument("--weight-dtype", metavar="TYPE", help="int8: store large factors as int8, one scale a row")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compress, and print what it came to."""
    # transformers takes seconds to import: only the command that needs it pays.
    import transformers

    from ..compress.pipeline import compress
    from ..convert.presets import KronConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = arguments.preset
    if arguments.config is not None:
        config = KronConfig.from_json(arguments.config.read_text(encoding="utf-8"))
    report = compress(
        arguments.model,
        arguments.out,
        config,
        calibrate_text=arguments.calibrate,
        calibrate_lines=arguments.calibrate_lines,
        warm_start=arguments.warm_start,
        warm_start_steps=arguments.warm_start_steps,
        terms=arguments.terms,
        weight_dtype=arguments.weight_dtype,
        overwrite=arguments.force,
        progress=Progress(),
    )
    if arguments.json:
        print_json(report.to_dict())
    else:
        _print(report)
    return 0


def _print(report: CompressReport) -> None:
    conversion = report.conversion
    fitted = [layer for layer in conversion.layers if layer.role != "embedding"]
    headers = ["layer", "factors", "terms", "parameters", "before", "weight error"]
    data_aware = any(layer.weighted_error is not None for layer in fitted)
    rows = []
    for layer in conversion.layers:
        row = [
            layer.name,
            f"{layer.a[0]}x{layer.a[1]} (x) {layer.b[0]}x{layer.b[1]}",
            layer.terms,
            f"{layer.params_after:,}",
            f"{layer.params_before:,}",
            "-" if layer.relative_error is None else f"{layer.relative_error:.3f}",
        ]
        if data_aware:
            row.append("-" if layer.weighted_error is None else f"{layer.weighted_error:.3f}")
        rows.append(row)
    print(format_table(headers + ["output error"] * data_aware, rows))
    before, after = report.linear_flops_before / 1e9, report.linear_flops_after / 1e9
    print(
        f"\n{report.architecture} in {report.target}: {conversion.params_before:,} -> {conversion.params_after:,} "
        f"parameters ({conversion.compression:.1f}x fewer)\n"
        f"linear layers on 128 tokens: {before:.3f} -> {after:.3f} GFLOP ({before / after:.1f}x fewer)"
    )
    if data_aware:
        print(f"data-aware fit on {report.calibration_lines} lines, {report.calibration_tokens:,} tokens")
    if (trained := report.blocks) is not None:
        rows = [[block.name, f"{block.error_before:.3f}", f"{block.error_after:.3f}"] for block in trained.blocks]
        print(f"block-wise training, {trained.steps} steps each, errors of the blocks' outputs before and after:\n")
        print(format_table(["block", "before", "after"], rows))
    if (int8 := report.quantization) is not None:
        text = "the text" if report.calibration_lines else "random token ids"
        print(
            f"int8 factors: {int8.bytes_before / 1e6:.2f} -> {int8.bytes_after / 1e6:.2f} MB of weights; last hidden "
            f"states agree with those of the unquantized factors to a mean cosine of {int8.agreement:.5f} on {text}"
        )
