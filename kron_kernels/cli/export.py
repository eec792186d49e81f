"""``kron-kernels export``: write a model folder as one file to serve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import add_json_flag, format_table, print_json

if TYPE_CHECKING:
    from ..runtime import ExportReport


def add_parser(commands: Any) -> None:
    """Add the ``export`` command."""
    parser = commands.add_parser(
        "export",
        help="write a model as one file for serving",
        description="Write a compressed (or dense) BERT as one file that runs without transformers: a program of "
        "torch.export (.pt2), or an ONNX model (.onnx). It is checked against eager torch before it takes its place.",
    )
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("out", type=Path, help="file to write, its suffix the format: .pt2 or .onnx")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="of weights and arithmetic (fp32)")
    parser.add_argument("--dense", type=Path, metavar="DIR", help="folder of the dense model, to compare sizes")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, and print sizes and errors."""
    # transformers takes seconds to import: only the command that needs it pays.
    import transformers

    from ..runtime import export_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report = export_model(
        arguments.model, arguments.out, dtype=arguments.dtype, dense_dir=arguments.dense, overwrite=arguments.force
    )
    if arguments.json:
        print_json(report.to_dict())
    else:
        _print(report)
    return 0


def _print(report: ExportReport) -> None:
    sizes = [("package", report.package_bytes), ("model", report.model_bytes), ("dense model", report.dense_bytes)]
    print(format_table(("size", "bytes"), [(name, f"{size:,}") for name, size in sizes if size is not None]))
    print()
    errors = [(name, f"{error:.1e}", f"{report.tolerance:.0e}") for name, error in report.errors.items()]
    print(format_table(("output", "error", "tolerance"), errors))
    print()
    kind = "node" if report.format == "onnx" else "op of kron_kernels"
    print(format_table((kind, "calls"), list(report.nodes.items())))
    print(f"\n{report.architecture} as {report.format}, {report.dtype}, in {report.target}")
