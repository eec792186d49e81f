"""Tables and plots from the result files, put between two markers in the README.

python -m bench.report            write them
python -m bench.report --check    exit code 1 where the README is not what the results give
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness import RESULTS, ROOT, Row, read_rows
from bench.targets import Verdict, reach

BEGIN, END = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
MACHINE_KEY = ("cpu", "isa", "cores", "threads")
STOCK = ("torch.kron + linear", "matmul B first", "matmul A first", "matmul, compiled")
PEERS = ("LyCORIS", "PEFT", "FastKron")
NONE_YET = "No results are in `bench/results` yet; `make bench` measures this machine."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to write into")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    old = arguments.readme.read_text(encoding="utf-8") if arguments.readme.exists() else f"{BEGIN}\n{END}\n"
    new = fill(old, render(arguments.results))
    if arguments.check:
        if new != old:
            sys.exit(f"{arguments.readme} is not what {arguments.results} gives: run python -m bench.report")
        return
    temporary = arguments.readme.with_name(f".{arguments.readme.name}")
    temporary.write_text(new, encoding="utf-8")
    os.replace(temporary, arguments.readme)
    if read_rows(arguments.results / "layers.csv"):
        from bench.plots import plot_layers

        plot_layers(arguments.results)


def fill(readme: str, results: str) -> str:
    """The README with what stands between the markers replaced; ValueError where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"readme: expected {BEGIN!r} and {END!r} once each")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{results}{END}{after}"


def render(results: Path) -> str:
    """Everything that the result files say, as Markdown."""
    layers, memory, model = (read_rows(results / f"{name}.csv") for name in ("layers", "memory", "model"))
    machines = list(dict.fromkeys(machine_of(row) for row in (*layers, *model)))
    if not machines:
        return f"\n{NONE_YET}\n\n"
    parts = []
    for machine in machines:
        mine = [[row for row in rows if machine_of(row) == machine] for rows in (layers, memory, model)]
        parts += _machine_section(machine, *mine)
    if (results / "layers.png").exists():
        parts.insert(0, f"![Speed-up by layer and rows]({_link(results / 'layers.png')})")
    return "\n" + "\n\n".join(parts) + "\n\n"


def machine_of(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in MACHINE_KEY)


def _machine_section(machine: tuple[str, ...], layers: list[Row], memory: list[Row], model: list[Row]) -> list[str]:
    cpu, isa, cores, threads = machine
    first = (layers or model)[0]
    dates = sorted({row["date"] for row in (*layers, *model)})
    commits = ", ".join(sorted({row["commit"] for row in (*layers, *model)}))
    parts = [
        f"### {cpu}, {cores} cores, kernels at {isa}",
        f"{threads} threads, Python {first['python']}, torch {first['torch']}, {' to '.join(dict.fromkeys(dates))}, "
        f"measured at commit {commits}. Times faster than dense `F.linear` of the same layer, bias included: the "
        "median over the rounds of one interleaved run. ✓ and ✗ say whether the reach set for it was met; "
        "a figure without either had none. Every way was checked against float64 before it was timed.",
    ]
    for dtype, direction, weights in dict.fromkeys((row["dtype"], row["direction"], row["weights"]) for row in layers):
        rows = [
            row for row in layers if (row["dtype"], row["direction"], row["weights"]) == (dtype, direction, weights)
        ]
        parts.append(f"**Layers, {dtype}, {direction}**{_weights(weights)}")
        parts.append(_speed_table(rows))
        if weights == "hot":
            parts.append(_beside_table(rows, f"{dtype}, {direction}"))
    if model:
        parts += ["**BERT-base encoder** (real configuration, random weights: cost does not depend on the values)"]
        parts.append(_model_table(model))
    if memory:
        parts += ["**Peak memory of forward beyond the output, MiB**", _memory_table(memory)]
    missed = _missed(layers)
    if missed:
        parts += [
            f"**What falls short** ({len(missed)} of {_judged(layers)} figures with a reach)",
            _missed_table(missed),
        ]
    troubles = _troubles(layers)
    if troubles:
        parts += ["<details><summary>Not timed, and why</summary>", troubles, "</details>"]
    return parts


def _weights(weights: str) -> str:
    return ", weights of 12 layers in turn (cold)" if weights == "cold" else ""


def _tokens(rows: list[Row]) -> list[str]:
    return sorted({row["tokens"] for row in rows}, key=int)


def _cases(rows: list[Row]) -> dict[str, Row]:
    """Case name -> one of its rows, in the order of the file."""
    cases: dict[str, Row] = {}
    for row in rows:
        cases.setdefault(row["case"], row)
    return cases


def _find(rows: list[Row], case: str, tokens: str, variant: str) -> Row | None:
    return next(
        (
            row
            for row in rows
            if (row["case"], row["tokens"], row["variant"], row["status"]) == (case, tokens, variant, "ok")
        ),
        None,
    )


def verdict(row: Row) -> Verdict:
    """Our speed-up in a row beside its reach."""
    wanted = reach(row["case"], row["dtype"], row["direction"], int(row["tokens"]), row["isa"])
    return Verdict(float(row["speedup_q50"]), wanted if row["weights"] == "hot" else None)


def _speed_table(rows: list[Row]) -> str:
    """Ours: a case a row, a number of tokens a column, and the share of the matrix-product peak at the largest."""
    tokens = _tokens(rows)
    lines = []
    for case, row in _cases(rows).items():
        ours = [_find(rows, case, count, "kron_kernels") for count in tokens]
        share = next((f"{float(found['peak_share']):.0%}" for found in reversed(ours) if found), "-")
        figures = [str(verdict(found)) if found else "-" for found in ours]
        lines.append((case, row["factors"].replace("(x)", "⊗"), f"{float(row['saving']):.1f}", *figures, share))
    headers = ("layer", "factors", "operations saved", *(f"T = {count}" for count in tokens), "of GEMM peak")
    return markdown(headers, lines)


def _beside_table(rows: list[Row], what: str) -> str:
    """The same beside the others: best stock torch, pre-packed dense, each peer."""
    names = [name for name in ("dense, packed", *PEERS) if any(row["variant"] == name for row in rows)]
    lines = []
    for case in _cases(rows):
        for count in _tokens(rows):
            ours = _find(rows, case, count, "kron_kernels")
            stock = [found for name in STOCK if (found := _find(rows, case, count, name))]
            best = max(stock, key=lambda row: float(row["speedup_q50"]), default=None)
            cells = [_figure(_find(rows, case, count, name)) for name in names]
            stock_cell = f"{_figure(best)} ({best['variant']})" if best else "-"
            lines.append((case, count, _with_range(ours), stock_cell, *cells))
    headers = ("layer", "T", "kron_kernels (10 % to 90 %)", "best stock torch", *names)
    return f"<details><summary>Beside the others, {what}</summary>\n\n{markdown(headers, lines)}\n\n</details>"


def _figure(row: Row | None) -> str:
    return f"{float(row['speedup_q50']):.2f}" if row else "-"


def _with_range(row: Row | None) -> str:
    return f"{_figure(row)} ({float(row['speedup_q10']):.2f} to {float(row['speedup_q90']):.2f})" if row else "-"


def _model_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        timed = bool(row["speedup_q50"])
        lines.append(
            (
                f"{row['dtype']}, {row['batch']} x {row['sequence']}",
                row["layers"],
                row["model"],
                f"{int(row['parameters']) / 1e6:.1f}M",
                f"{float(row['time_ms_q50']):.1f}" if timed else row["status"],
                _with_range(row) if timed else "-",
                f"{float(row['forward_peak_mib']):.0f}" if row["forward_peak_mib"] else "-",
            )
        )
    headers = ("input", "layers", "model", "parameters", "ms", "speed-up (10 % to 90 %)", "peak memory of forward, MiB")
    return markdown(headers, lines)


def _memory_table(rows: list[Row]) -> str:
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for case, dtype, tokens in dict.fromkeys((row["case"], row["dtype"], row["tokens"]) for row in rows):
        found = {
            row["variant"]: row for row in rows if (row["case"], row["dtype"], row["tokens"]) == (case, dtype, tokens)
        }
        extras = [
            f"{float(found[name]['extra_mib']):.1f}" if name in found and found[name]["extra_mib"] else "-"
            for name in variants
        ]
        lines.append((case, dtype, tokens, f"{float(next(iter(found.values()))['output_mib']):.1f}", *extras))
    table = markdown(("layer", "dtype", "T", "output", *variants), lines)
    return f"<details><summary>By layer</summary>\n\n{table}\n\n</details>"


def _judged(layers: list[Row]) -> int:
    return sum(
        1
        for row in layers
        if row["variant"] == "kron_kernels" and row["status"] == "ok" and verdict(row).reach is not None
    )


def _missed(layers: list[Row]) -> list[Row]:
    missed = []
    for row in layers:
        if row["variant"] == "kron_kernels" and row["status"] == "ok":
            found = verdict(row)
            if found.reach is not None and found.speedup < found.reach:
                missed.append(row)
    return missed


def _missed_table(rows: list[Row]) -> str:
    lines = [
        (
            row["case"],
            f"{row['dtype']}, {row['direction']}",
            row["tokens"],
            _with_range(row),
            f"{verdict(row).reach:g}",
            f"{float(row['peak_share']):.0%}",
        )
        for row in rows
    ]
    return markdown(("layer", "", "T", "measured (10 % to 90 %)", "reach", "of GEMM peak"), lines)


def _troubles(layers: list[Row]) -> str:
    """Who was not timed: the reason, the layers, and how many points."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in layers:
        if row["status"] != "ok":
            groups.setdefault((row["variant"], row["status"], row["reason"]), []).append(row)
    lines = [
        (variant, status, reason, ", ".join(_cases(rows)), len(rows))
        for (variant, status, reason), rows in groups.items()
    ]
    return markdown(("variant", "", "why", "layers", "points"), lines) if lines else ""


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _link(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix() if path.resolve().is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    main()
