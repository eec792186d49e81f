"""``kron-kernels distill encoder``: label-free distillation of a sentence encoder on plain text."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .extras import needs_extra
from .output import Progress, add_json_flag, format_table, print_json

HELD_OUT = 500  # sentences at most, and a tenth of the text


def add_stage(stages: Any) -> None:
    """Add ``encoder`` to the stages of ``distill``."""
    parser = stages.add_parser(
        "encoder",
        help="distil a sentence encoder on plain text, without labels",
        description="The student learns the teacher's mean-pooled sentence vectors and their similarities. A tenth of "
        "the text (500 sentences at most) is held out and tells how well both agree, before and after.",
        epilog="example: kron-kernels distill encoder --teacher bert --size 8x --text lines.txt --out run",
    )
    parser.add_argument("--teacher", required=True, metavar="MODEL", help="folder or hub name of the dense encoder")
    student = parser.add_mutually_exclusive_group(required=True)
    student.add_argument("--size", help="make the student: 8x for eight times fewer parameters, or a number of them")
    student.add_argument("--student", metavar="MODEL", help="folder that `compress` made from the teacher")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text, a sentence a line")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder of the run and of RUN/model")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="of training (20)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="steps instead of minutes")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="sentences a step (128)")
    parser.add_argument("--max-length", type=int, default=64, metavar="N", help="tokens a sentence in training (64)")
    parser.add_argument("--positions", type=int, metavar="N", help="with --size: drop position rows beyond N tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="peak of the schedule (1e-3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Distil, save ``RUN/model`` and print the agreement with the teacher on held-out text."""
    with needs_extra("distill"):
        import transformers

        from ..compress import compress
        from ..compress.checkpoint import copy_companions, load_dense, load_tokenizer
        from ..compress.files import new_folder
        from ..compress.text import read_lines
        from ..convert.agreement import vector_agreement
        from ..distill.encoder import distill_encoder, encode
        from ..models import KronBertModel

    transformers.logging.set_verbosity_error()
    sentences = list(dict.fromkeys(read_lines(arguments.text, sys.maxsize)))
    held_out = min(HELD_OUT, len(sentences) // 10)
    if held_out < 2:
        raise ValueError(f"text: expected at least 20 different sentences, got {len(sentences)} in {arguments.text}")
    step = len(sentences) // held_out
    test = sentences[::step][:held_out]
    chosen = set(test)
    teacher = load_dense(arguments.teacher).base_model
    tokenizer = load_tokenizer(arguments.teacher)
    progress = Progress()
    started: dict[str, Any] = {}

    def made(start: Path) -> Any:
        if arguments.size is not None and not start.is_dir():
            options: dict[str, Any] = {"max_length": arguments.positions, "calibrate_text": arguments.text}
            compress(arguments.teacher, start, size=arguments.size, progress=progress, **options)
        source = start if arguments.student is None else Path(arguments.student)
        student = KronBertModel.from_pretrained(source, local_files_only=True)
        student.pooler, student.config.add_pooling_layer = None, False  # mean pooling does without
        started.update(source=source, vectors=encode(student.eval(), rows))
        return student

    rows = tokenizer(test, truncation=True, max_length=arguments.max_length)["input_ids"]
    wanted = encode(teacher, rows)
    with redirect_stdout(sys.stderr):  # the Trainer prints its logs
        student, result = distill_encoder(
            teacher,
            made,
            tokenizer,
            [sentence for sentence in sentences if sentence not in chosen],
            arguments.out,
            minutes=arguments.minutes,
            max_steps=arguments.max_steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            max_length=arguments.max_length,
            seed=arguments.seed,
            progress=progress,
        )
    with new_folder(arguments.out / "model") as folder:
        student.save_pretrained(folder)
        copy_companions(started["source"], folder)
    before, after = started["vectors"], encode(student, rows)
    found = {"before": vector_agreement(wanted, before), "after": vector_agreement(wanted, after)}
    if arguments.json:
        print_json({"steps": result.steps, "seconds": result.seconds, "held_out": held_out, **found})
        return 0
    names = list(found["after"])
    print(
        format_table(
            ("distillation", *names), [(when, *(f"{row[n]:.3f}" for n in names)) for when, row in found.items()]
        )
    )
    print(f"{result.steps} steps in {result.seconds / 60:.1f} minutes; the model: {arguments.out / 'model'}")
    return 0
