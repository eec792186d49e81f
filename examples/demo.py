"""Compress a real sentence encoder to an eighth and a twenty-first, distil both on plain text, compare with the dense
one.

The encoder is all-MiniLM-L6-v2 (384 wide, 6 layers), the sentences are film reviews; `make demo` fetches both. No
labels are used. What is left in the output folder are models one would use: checkpoints that transformers loads.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_data import encoder_folder, reviews
from torch import Tensor, nn

from kron_kernels import optimize_for_inference
from kron_kernels.cli.output import format_table
from kron_kernels.compress import Planner
from kron_kernels.compress.checkpoint import shorten_positions_
from kron_kernels.compress.plan import parse_size
from kron_kernels.compress.text import token_counts, tokenize
from kron_kernels.convert import calibrate
from kron_kernels.convert.agreement import vector_agreement
from kron_kernels.convert.counting import count_parameters
from kron_kernels.distill.encoder import distill_encoder, encode
from kron_kernels.models import KronBertModel

CALIBRATION, HELD_OUT, NEIGHBOURS_OF, MAX_LENGTH, POSITIONS, SENTENCES = 512, 500, 3, 32, 128, 4000
# For a minute: of larger batches few steps fit, and at the usual rate the first ones lose what the fit had.
BATCH, RATE = 32, 5e-4


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress, distil and compare a sentence encoder.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the models and their checkpoints")
    parser.add_argument("--sizes", nargs="+", default=["8x", "21x"], help="how many times fewer parameters (8x 21x)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of distillation for each size; more is better (1)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    path = encoder_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    dense = transformers.BertModel.from_pretrained(path, add_pooling_layer=False).eval()
    parameters = count_parameters(dense)
    shorten_positions_(dense, POSITIONS)
    texts = [text for text, _ in reviews()]
    random.Random(0).shuffle(texts)
    held_out, training = texts[:HELD_OUT], texts[HELD_OUT : HELD_OUT + SENTENCES]
    rows = tokenizer(held_out, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    vectors = {"dense": encode(dense, rows)}
    models: dict[str, Any] = {"dense": dense}
    sizes: dict[str, int] = {}

    print(f"== measuring what the layers of all-MiniLM-L6-v2 compute on {CALIBRATION} sentences")
    batches = tokenize(tokenizer, training[:CALIBRATION], MAX_LENGTH)
    calibration = calibrate(dense, batches)
    calibration.token_counts = token_counts(tokenizer, training, dense.config.vocab_size)
    planner = Planner(dense, calibration, batches[::4])

    int8 = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    models["dense, int8 linears"] = int8
    vectors["dense, int8 linears"] = encode(int8, rows)
    paper = KronBertModel.from_dense(dense, "K21", calibration=calibration).eval()
    models["K21 (the paper's), untrained"] = paper
    vectors["K21 (the paper's), untrained"] = encode(paper, rows)
    for size in arguments.sizes:
        plan = planner.plan(parse_size(size, parameters))
        student = KronBertModel.from_dense(dense, plan.config, calibration=calibration)
        vectors[f"{size}, untrained"] = encode(student.eval(), rows)
        print(f"== {size}: {plan.params:,} of {parameters:,} parameters; {arguments.minutes:g} minutes without labels")
        distill_encoder(
            dense,
            student,
            tokenizer,
            training,
            arguments.out / f"run-{size}",
            minutes=arguments.minutes,
            max_length=MAX_LENGTH,
            batch_size=BATCH,
            learning_rate=RATE,
        )
        folder = arguments.out / f"minilm-{size}"
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        sizes[f"{size}, distilled"] = file_size(student)
        models[f"{size}, distilled"] = optimize_for_inference(KronBertModel.from_pretrained(folder).eval())
        vectors[f"{size}, distilled"] = encode(models[f"{size}, distilled"], rows)

    milliseconds = latency(models, rows)
    print(f"\nagreement with the dense encoder on {HELD_OUT} held-out sentences")
    table = [
        (
            name,
            f"{(sizes.get(name) or file_size(models[name])) / 1e6:.1f} MB" if name in models else "",
            *(f"{value:.3f}" for value in vector_agreement(vectors["dense"], vectors[name]).values()),
            f"{milliseconds[name]:.1f}" if name in models else "",
        )
        for name in vectors
    ]
    print(format_table(("model", "fp32 weights", "cosine", "correlation", "same neighbour", "ms, 8 x 32"), table))
    show_neighbours(held_out, vectors)
    print("\nthe models:", *(arguments.out / f"minilm-{size}" for size in arguments.sizes))
    print("load one:   import kron_kernels.models; AutoModel.from_pretrained(folder)")


def show_neighbours(sentences: Sequence[str], vectors: dict[str, Tensor]) -> None:
    """Print the nearest neighbour of some sentences by each model."""
    for index in range(NEIGHBOURS_OF):
        print(f"\n{sentences[index]!r}")
        for name in (name for name in vectors if "untrained" not in name):
            rows = vectors[name]
            similarities = rows @ rows[index]
            similarities[index] = -1
            print(f"   {name:20} {float(similarities.max()):.2f}  {sentences[int(similarities.argmax())][:90]!r}")


def latency(models: dict[str, Any], rows: Sequence[Sequence[int]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of a batch of 8 sentences, the models taking turns."""
    batch = {"input_ids": torch.tensor([(list(row) * 8)[:32] for row in rows[:8]])}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, model in models.items():
                began = time.perf_counter()
                model(**batch)
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def file_size(model: nn.Module) -> int:
    """Bytes of the weights as torch saves them."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.state_dict(), file.name)
        return Path(file.name).stat().st_size


if __name__ == "__main__":
    main()
