"""Compress a real sentence encoder, distil it on plain text, and compare it with the dense one on held-out sentences.

The encoder is all-MiniLM-L6-v2 (384 wide, 6 layers), the sentences are film reviews; `make demo` fetches both. No
labels are used. What is left in the output folder is a model one would use: a checkpoint that transformers loads.
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
from kron_kernels.compress import start_model
from kron_kernels.compress.text import tokenize
from kron_kernels.convert import preset
from kron_kernels.convert.agreement import vector_agreement
from kron_kernels.convert.counting import count_parameters
from kron_kernels.distill.encoder import distill_encoder, encode
from kron_kernels.models import KronBertModel
from kron_kernels.nn import KronLinear
from kron_kernels.schemas import reference
from kron_kernels.testing.problems import relative_error

CALIBRATION, HELD_OUT, NEIGHBOURS_OF, MAX_LENGTH, BATCH, SENTENCES = 384, 500, 3, 32, 32, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the model and its checkpoints")
    parser.add_argument("--preset", default="K8", help="K8, K19 or K21")
    parser.add_argument("--minutes", type=float, default=1.0, help="of distillation; more is better (1)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    path = encoder_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    dense = transformers.BertModel.from_pretrained(path, add_pooling_layer=False).eval()
    texts = [text for text, _ in reviews()]
    random.Random(0).shuffle(texts)
    held_out, training = texts[:HELD_OUT], texts[HELD_OUT : HELD_OUT + SENTENCES]
    rows = tokenizer(held_out, truncation=True, max_length=MAX_LENGTH)["input_ids"]

    print(f"== {arguments.preset}: fit to what the layers of all-MiniLM-L6-v2 compute on {CALIBRATION} sentences")
    batches = tokenize(tokenizer, training[:CALIBRATION], MAX_LENGTH)
    config = preset(arguments.preset, dense.config.hidden_size, dense.config.intermediate_size)
    student, _, _ = start_model(KronBertModel, dense, config, batches, method="data-aware")
    student.pooler = None  # mean pooling does without
    print(f"   largest kernel error against float64: {kernel_error(student):.1e}")
    vectors = {"dense fp32": encode(dense, rows), "compressed, no training": encode(student, rows)}

    print(f"== distillation on {len(training):,} sentences without labels, {arguments.minutes:g} minutes")
    distill_encoder(
        dense,
        student,
        tokenizer,
        training,
        arguments.out / "run",
        minutes=arguments.minutes,
        max_length=MAX_LENGTH,
        batch_size=BATCH,
    )
    folder = arguments.out / f"minilm-{arguments.preset.lower()}"
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    int8 = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear}, dtype=torch.qint8)
    served = optimize_for_inference(KronBertModel.from_pretrained(folder, add_pooling_layer=False).eval())
    vectors["dense int8 linears"] = encode(int8, rows)
    vectors["compressed, distilled"] = encode(served, rows)
    parameters = count_parameters(dense)
    models = {
        "dense fp32": (dense, parameters, file_size(dense)),
        "dense int8 linears": (int8, parameters, file_size(int8)),
        "compressed, no training": (None, count_parameters(student), file_size(student)),
        "compressed, distilled": (served, count_parameters(student), file_size(student)),
    }
    milliseconds = latency({name: model for name, (model, _, _) in models.items() if model is not None}, rows)
    print(f"\nagreement with the dense encoder on {HELD_OUT} held-out sentences")
    table = [
        (
            name,
            f"{count / 1e6:.2f}M",
            f"{size / 1e6:.1f} MB",
            *(f"{value:.3f}" for value in vector_agreement(vectors["dense fp32"], vectors[name]).values()),
            f"{milliseconds[name]:.1f}" if name in milliseconds else "",
        )
        for name, (_, count, size) in models.items()
    ]
    headers = ("model", "parameters", "on disk", "cosine", "correlation", "same neighbour", "ms a batch of 8")
    print(format_table(headers, table))
    show_neighbours(held_out, vectors)
    print(f"\nthe model: {folder}\nload it:   import kron_kernels.models; AutoModel.from_pretrained({str(folder)!r})")


def kernel_error(model: nn.Module) -> float:
    """The largest relative error of a layer's output against the float64 reference."""
    worst = 0.0
    for module in model.modules():
        if isinstance(module, KronLinear):
            x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(0))
            operands = (tensor.detach().double() for tensor in (module.a, module.b, module.bias))
            wanted = reference.kron_matmul(x.double(), *operands)
            with torch.no_grad():
                worst = max(worst, relative_error(module(x), wanted))
    return worst


def show_neighbours(sentences: Sequence[str], vectors: dict[str, Tensor]) -> None:
    """Print the nearest neighbour of some sentences by each model."""
    for index in range(NEIGHBOURS_OF):
        print(f"\n{sentences[index]!r}")
        for name, rows in vectors.items():
            similarities = rows @ rows[index]
            similarities[index] = -1
            print(f"   {name:24} {float(similarities.max()):.2f}  {sentences[int(similarities.argmax())][:90]!r}")


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
