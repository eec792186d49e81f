"""The tables of docs/int8.md: bytes on disk, and how well the outputs agree with those of float32 factors.

    python scripts/int8_tables.py                                  # BERT-base, random weights: sizes
    python scripts/int8_tables.py --model DIR --text SENTENCES     # a checkpoint: sizes and agreement

The text holds a sentence a line: the first half is for the data-aware fit, the other for the agreement.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from kron_kernels.cli.output import format_table
from kron_kernels.compress.pipeline import calibrate_on, load_dense, read_lines, tokenize
from kron_kernels.convert.presets import preset
from kron_kernels.convert.quantize import hidden_agreement, quantize_
from kron_kernels.models import KronBertConfig, KronBertModel

PRESETS = ("K8", "K21")
# Of the large factors, and of everything else.
FORMS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a BERT checkpoint with its tokenizer")
    parser.add_argument("--text", type=Path, help="sentences, one a line")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.model is None:
        models = {name: KronBertModel(KronBertConfig(kron=name)).eval() for name in PRESETS}
        print(format_table(*size_table(models)))
    else:
        print(format_table(*agreement_table(arguments.model, read_lines(arguments.text, 10**6))))


def in_form(model: Any, factors: str, rest: str) -> Any:
    """A copy of a float32 model with its large factors and everything else in these dtypes."""
    model = copy.deepcopy(model).to(getattr(torch, rest))
    if factors == "int8":
        quantize_(model)
    return model


def file_bytes(model: Any) -> int:
    """Bytes of the safetensors file that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size


def size_table(models: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the sizes of float32 models by their presets' names, in every form."""
    rows = []
    for factors, rest in FORMS:
        sizes = (file_bytes(in_form(model, factors, rest)) / 1e6 for model in models.values())
        rows.append([factors, rest, *(f"{size:.2f}" for size in sizes)])
    return ["large factors", "the rest", *(f"{name}, MB" for name in models)], rows


def agreement_table(folder: Path, sentences: list[str]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: of each preset and form, bytes and the agreement with float32, on text unseen by the fit."""
    dense = load_dense(folder)
    half = len(sentences) // 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = tokenize(tokenizer, sentences[half:])
    rows = []
    for name in PRESETS:
        config = preset(name, dense.config.hidden_size, dense.config.intermediate_size)
        calibration = calibrate_on(dense, folder, sentences[:half], config)
        model = KronBertModel.from_dense(dense, config, calibration=calibration)
        for factors, rest in FORMS[1:]:
            other = in_form(model, factors, rest)
            agreement = hidden_agreement(model, other, batches)
            rows.append([name, factors, rest, f"{file_bytes(other) / 1e6:.2f}", f"{100 * (1 - agreement):.3f}"])
    return ["preset", "large factors", "the rest", "MB", "1 - cosine, %"], rows


if __name__ == "__main__":
    main()
