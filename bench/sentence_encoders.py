"""Scores of sentence encoders that `kron-kernels distill encoder` made, beside their teacher, into encoders.csv.

    python -m bench.sentence_encoders --name all-MiniLM-L6-v2 --teacher MODEL --data glue/STS-B 8x=RUN 21x=RUN

For each run the student, and with all its matrices rounded to int8 and int4, one scale a row; the teacher likewise. The
bytes are what the values and a half-precision scale a row take.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.harness import RESULTS, Row, read_rows, stamp, write_rows
from kron_kernels.convert.counting import count_parameters
from kron_kernels.convert.quantize import weight_bytes
from kron_kernels.distill.run_folder import RunFolder
from kron_kernels.distill.similarity import evaluate_similarity, load_encoder, load_tokenizer

COLUMNS = ("teacher", "task", "model", "variant", "score", "parameters", "bytes", "steps", "minutes", "seed")
STAMP = ("machine", "commit", "date", "torch", "kron_kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score distilled sentence encoders beside their teacher.")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="what to call a model, and the folder of its run")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--name", required=True, help="of the teacher, in the table")
    parser.add_argument("--task", default="stsb")
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.teacher)
    path = RESULTS / "encoders.csv"
    rows = read_rows(path)
    now = stamp(torch.get_num_threads())
    for model, variant, network, size, trained in _models(arguments):
        score = evaluate_similarity(network, arguments.task, arguments.data, tokenizer=tokenizer).score
        key = {"teacher": arguments.name, "task": arguments.task, "model": model, "variant": variant}
        sizes = {"parameters": count_parameters(network), "bytes": size}
        row = {**key, "score": f"{score:.2f}", **sizes, **trained, **{column: now[column] for column in STAMP}}
        rows = [each for each in rows if any(each[name] != value for name, value in key.items())] + [row]
        write_rows(path, (*COLUMNS, *STAMP), rows)
        print(model, variant, row["score"], sizes)


def _models(arguments: argparse.Namespace) -> Iterator[tuple[str, str, nn.Module, int, Row]]:
    teacher = load_encoder(arguments.teacher)
    teacher.pooler = None
    found: list[tuple[str, Any, Row]] = [("teacher", teacher, {"steps": "", "minutes": "", "seed": ""})]
    for name, folder in (run.split("=", 1) for run in arguments.runs):
        run = RunFolder(folder)
        seconds = max((entry.get("seconds") or 0.0 for entry in run.log), default=0.0)
        trained = {
            "steps": run.identity["steps"],
            "minutes": f"{seconds / 60:.1f}",
            "seed": run.config["seed"],
        }
        found.append((name, load_encoder(run.model_path), trained))
    for name, model, trained in found:
        yield name, "", model, weight_bytes(model), trained
        for bits in (8, 4):
            yield name, f"int{bits}", *_rounded(model, bits), trained


@torch.no_grad()
def _rounded(model: Any, bits: int) -> tuple[nn.Module, int]:
    """A copy with every matrix rounded to ``bits``, one scale a row, and its bytes."""
    rounded, most, size = copy.deepcopy(model), 2 ** (bits - 1) - 1, 0
    for parameter in rounded.parameters():
        if parameter.ndim < 2:
            size += 4 * parameter.numel()
            continue
        scale = parameter.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
        parameter.copy_((parameter / scale).round() * scale)
        size += parameter.numel() * bits // 8 + 2 * scale.numel()
    return rounded, size


if __name__ == "__main__":
    main()
