"""Write docs/results from the CSV files: ``python -m bench.report`` (``--check``: exit code 1 where they differ).

cpu.md and gpu.md hold speed and memory, accuracy.md what compressed models keep; summary.md and encoder.png are for the
README.
Generated text lives there alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.harness import KEY, RESULTS, ROOT, Row, read_rows
from bench.report_accuracy import accuracy
from bench.report_summary import summary
from bench.targets import target
from kron_kernels.testing.tables import markdown, save, subplots

HEADER = "<!-- Made by `python -m bench.report` from bench/results; edits are lost. -->\n\n"
SUITES = ("encoder", "ffn", "layers", "distill", "adapters")
OURS = "kron_kernels"
STOCK = ("torch.kron + linear", "matmul", "matmul B first", "matmul A first", "matmul, compiled")
ABOUT_CPU = """# Speed and memory on a CPU

Times faster than dense torch that computes the same, biases included: medians over the rounds of an interleaved run,
same threads and dtype, each candidate checked against float64 first. "Best stock torch" is the quickest of the two
orders of two matrix products, plain and compiled, and of `torch.kron` with a dense layer. Runs whose 10 % and 90 %
quantiles differ by more than three times are left out, as is a point whose dense run was disturbed. ✓ and ✗ say whether
a target was met; a figure without either had none.
Measure a machine with `python -m bench.run all`, one suite with `python -m bench.run encoder`.

![Speed-up of a BERT-base encoder over dense torch](encoder.png)
"""
ABOUT_GPU = "# Speed on a GPU\n\n"
NO_GPU = (
    "No figure: none was measured yet. `python -m bench.run gpu --minutes 15` proves, tunes and measures in one go.\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder to write to")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    pages = {"cpu.md": cpu, "gpu.md": gpu, "accuracy.md": accuracy, "summary.md": summary}
    for name, make in pages.items():
        text, path = HEADER + make(arguments.results), arguments.out / name
        if arguments.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path}: not what {arguments.results} gives: run python -m bench.report")
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if not arguments.check:
        plot(steady(read_rows(arguments.results / "encoder.csv")), arguments.out / "encoder.png")


def steady(rows: Sequence[Row]) -> list[Row]:
    """Return the timed rows that were not disturbed, and none of a point whose dense run was."""
    timed = [row for row in rows if row["time_us_q50"]]
    calm = [row for row in timed if float(row["time_us_q90"]) <= 3 * float(row["time_us_q10"])]
    bases = {_point(row) for row in calm if row["variant"] == "dense"}
    return [row for row in calm if _point(row) in bases]


def _point(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in (*KEY[:-1], "machine"))


def cpu(results: Path) -> str:
    """Return the page of the CPU: a section for each machine, the one measured last first."""
    files = {name: steady(read_rows(results / f"{name}.csv")) for name in SUITES}
    newest = sorted((row for rows in files.values() for row in rows), key=lambda row: row["date"], reverse=True)
    parts = [ABOUT_CPU]
    for machine in dict.fromkeys(row["machine"] for row in newest):
        mine = {name: [row for row in rows if row["machine"] == machine] for name, rows in files.items()}
        every = [row for rows in mine.values() for row in rows]
        dates = sorted({row["date"] for row in every})
        parts.append(
            f"## {machine}\n\ntorch {every[-1]['torch']}, Python {every[-1]['python']}, "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commits "
            f"{', '.join(sorted({row['commit'] for row in every}))}."
        )
        parts += [
            *encoder_parts(mine["encoder"]),
            *op_parts(mine["ffn"], "Blocks"),
            *op_parts(mine["layers"], "Layers"),
        ]
        parts += [*plain_parts(mine["distill"], "Training steps of distillation", DISTILL)]
        parts += [*plain_parts(mine["adapters"], "Adapters and GPT-2", ADAPTERS), *missed(every)]
    return "\n\n".join(parts) + "\n"


DISTILL = "Teacher and student forward, all losses, backward, clipping and AdamW; only the student's layers differ."
ADAPTERS = (
    "`lokr-N-M`: forward and backward of a frozen layer N -> M with a LoKr adapter of factor 8, this package by "
    "`apply_kron_kernels_to_peft`. `tq-*`: TQCompressor's layers of four terms. `gpt2`: 32 tokens after a prompt of 32."
)


def pivot(rows: Iterable[Row], index: Sequence[str], cell: Callable[[Row], str]) -> str:
    """Return a Markdown table: a line for each value of the index columns, a column for each variant."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[column] for column in index), {})[row["variant"]] = cell(row)
    variants = list(dict.fromkeys(name for line in lines.values() for name in line))
    cells = [(*key, *(line.get(name, "-") for name in variants)) for key, line in lines.items()]
    return markdown((*index, *variants), cells)


def number(row: Row | None, column: str, form: str = ".2f", scale: float = 1.0) -> str:
    """Return a column of a row, "-" where it is empty."""
    return format(float(row[column]) * scale, form) if row and row.get(column) else "-"


def speed(row: Row) -> str:
    """Return milliseconds of dense, the speed-up of others, marked where a target was set."""
    if row["variant"] == "dense":
        return f"{number(row, 'time_us_q50', '.4g', 1e-3)} ms"
    wanted = target(row)
    mark = "" if wanted is None else " ✓" if float(row["speedup_q50"]) >= wanted else " ✗"
    return number(row, "speedup_q50") + mark


def encoder_parts(rows: list[Row]) -> list[str]:
    """Return speed and memory of encoders."""
    if not rows:
        return []
    rows = sorted(rows, key=lambda row: (row["dtype"] != "fp32", *map(int, row["input"].split("x"))))
    parts = [
        "### BERT-base encoder",
        "Real configuration, random weights: cost does not depend on the values. int8 rounds weights and activations "
        "(errors below); half the layers is another model. The training form has plain parameters, the inference form "
        "is what `optimize_for_inference` makes; up to commit dcdd8ed layers packed their factors by themselves, which "
        "counts as the inference form here.",
        pivot(rows, ("dtype", "input"), speed),
    ]
    if memory := [row for row in rows if row["memory_mib"]]:
        title = "Peak memory of loading the checkpoint and running it, beyond the imports, MiB:"
        parts += [title, pivot(memory, ("dtype", "input"), lambda row: number(row, "memory_mib", ".0f"))]
    int8 = [row for row in rows if "int8" in row["variant"]]
    if int8:
        parts += [
            "Relative error of the int8 candidates:",
            pivot(int8, ("input",), lambda row: number(row, "error", ".1e")),
        ]
    return parts


def op_parts(rows: list[Row], title: str) -> list[str]:
    """Return a table for each dtype, direction and state of the weights: this package, best stock torch in brackets."""
    parts = [f"### {title}"] if rows else []
    for kind in dict.fromkeys((row["dtype"], row["direction"], row["weights"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["direction"], row["weights"]) == kind]
        sizes = sorted({row["input"] for row in mine}, key=int)
        lines = []
        for case in dict.fromkeys(row["case"] for row in mine):
            found = {(row["input"], row["variant"]): row for row in mine if row["case"] == case}
            ours = [found.get((size, OURS)) for size in sizes]
            last = next((row for row in reversed(ours) if row), None)
            if last is not None:
                cells = [_with_stock(row, found) for row in ours]
                share = number(last, "peak_share", ".0%")
                lines.append((case, last["factors"].replace("(x)", "⊗"), number(last, "saving", ".1f"), *cells, share))
        headers = ("case", "factors", "operations saved", *(f"T = {size}" for size in sizes), "of GEMM rate")
        parts.append(f"**{', '.join(kind)} weights**: kron_kernels (best stock torch)\n\n{markdown(headers, lines)}")
    hot = [row for row in rows if row["variant"] not in (*STOCK, "dense") and row["weights"] == "hot"]
    if any(row["variant"] != OURS for row in hot):
        order = sorted(hot, key=lambda row: (row["dtype"] != "fp32", row["direction"], row["case"], int(row["input"])))
        table = pivot(order, ("dtype", "direction", "case", "input"), lambda row: number(row, "speedup_q50"))
        parts.append(f"<details><summary>Beside other libraries and forms of dense</summary>\n\n{table}\n\n</details>")
    if memory := [row for row in rows if row["memory_mib"]]:
        table = pivot(memory, ("dtype", "case", "input"), lambda row: number(row, "memory_mib", ".1f"))
        parts.append(
            f"<details><summary>Peak memory of forward beyond its output, MiB</summary>\n\n{table}\n\n</details>"
        )
    return parts


def _with_stock(row: Row | None, found: dict[tuple[str, str], Row]) -> str:
    if row is None:
        return "-"
    stock = [float(found[row["input"], name]["speedup_q50"]) for name in STOCK if (row["input"], name) in found]
    return speed(row) + (f" ({max(stock):.2f})" if stock else "")


def plain_parts(rows: list[Row], title: str, about: str) -> list[str]:
    """Return speed and memory of every candidate."""
    if not rows:
        return []
    index = ("case", "direction", "dtype", "input")
    parts = [f"### {title}", about, pivot(rows, index, speed)]
    if memory := [row for row in rows if row["memory_mib"]]:
        parts += ["Peak memory, MiB:", pivot(memory, index, lambda row: number(row, "memory_mib", ".0f"))]
    return parts


def missed(rows: list[Row]) -> list[str]:
    """Return what falls short of its target."""
    judged = [(row, wanted) for row in rows if (wanted := target(row)) is not None]
    short = [
        (
            *(row[column] for column in ("case", "variant", "direction", "dtype", "input")),
            f"{number(row, 'speedup_q50')} ({number(row, 'speedup_q10')} to {number(row, 'speedup_q90')})",
            f"{wanted:g}",
        )
        for row, wanted in judged
        if float(row["speedup_q50"]) < wanted
    ]
    if not short:
        return []
    headers = ("case", "variant", "direction", "dtype", "input", "measured (10 % to 90 %)", "target")
    return [f"### Below target: {len(short)} of {len(judged)}", markdown(headers, short)]


def gpu(results: Path) -> str:
    """Return the page of the GPU; the state of the correctness proof stands beside every figure."""
    rows = [row for row in read_rows(results / "gpu.csv") if row["time_us_q50"]]
    parts = [] if rows else [NO_GPU]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        mine = [row for row in rows if row["machine"] == machine]
        columns = ("case", "direction", "input", "variant", "proof")
        figures = {
            "time_us_q50": ".4g",
            "speedup_q50": ".2f",
            "floor_share": ".0%",
            "wall_us": ".4g",
            "launches": ".0f",
        }
        lines = [(*(row[name] for name in columns), *(number(row, *each) for each in figures.items())) for row in mine]
        headers = (*columns, "us", "over dense", "of the floor", "us with the host", "launches")
        parts += [f"## {machine}, commit {mine[-1]['commit']}", markdown(headers, lines)]
    return ABOUT_GPU + "\n\n".join(parts)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the speed-up over dense by input, of the machine with the most rows measured last."""
    shown = {"K21, inference form": "K21", "K8, inference form": "K8", "OpenVINO, int8": "OpenVINO, int8"}
    shown |= {"ONNX Runtime, int8": "ONNX Runtime, int8", "torchao, int8, compiled": "torchao, int8", "dense": "dense"}
    rows = [row for row in rows if row["case"] == "bert-base" and row["variant"] in shown]
    if not rows:
        return
    machine = max(rows, key=lambda row: (row["date"], row["machine"]))["machine"]
    rows = [row for row in rows if row["machine"] == machine]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = subplots(len(dtypes), 2, (4.6, 3.2))
    for axis, dtype in zip(axes, dtypes, strict=True):
        mine = [row for row in rows if row["dtype"] == dtype]
        inputs = sorted({row["input"] for row in mine}, key=lambda size: tuple(map(int, size.split("x"))))
        for rank, (name, label) in enumerate(shown.items()):
            found = {row["input"]: float(row["speedup_q50"]) for row in mine if row["variant"] == name}
            if found:
                style = {"marker": "o", "color": f"C{rank}"} if name != "dense" else {"ls": "--", "color": "black"}
                # One sequence of growing length, then batches of growing size: two lines of one colour.
                for text, single in ((label, True), (None, False)):
                    some = [size for size in inputs if size in found and size.startswith("1x") is single]
                    axis.plot(list(map(inputs.index, some)), [found[size] for size in some], label=text, **style)
        axis.set_xticks(range(len(inputs)), inputs, rotation=45, ha="right", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{dtype}", fontsize=10)
        axis.set_xlabel("batch x tokens", fontsize=9)
        axis.grid(axis="y", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("times faster than dense torch", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"BERT-base encoder, {machine}", fontsize=9)
    save(figure, path)


if __name__ == "__main__":
    main()
