"""Tables and plots from the result files, put between two markers in the README and in docs/integrations.md.

python -m bench.report            write them
python -m bench.report --check    exit code 1 where one of them is not what the results give
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.harness import RESULTS, ROOT, Row, read_rows
from bench.report_accuracy import accuracy_parts
from bench.report_distill import attention_parts, judged_steps, step_parts
from bench.report_integrations import gpt2_parts, judged_gpt2, judged_lokr, lokr_parts, orders_parts, transform_parts
from bench.report_layers import judged_layers, layer_parts, memory_table, peak_in_rounds, troubles
from bench.report_model import encoder_parts, judged_encoders, judged_processes, process_parts, profile_parts
from bench.tables import details, link, machine_of, markdown, missed_table

BEGIN, END = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
NONE_YET = "No results are in `bench/results` yet; `make bench` measures this machine."
# What each script measured, by the names of the result files.
INTEGRATIONS = ("integrations-lokr", "integrations-gpt2", "integrations-orders", "integrations-transform")
FILES = ("model", "ffn", "layers", "memory", "process", "profile", "distill-steps", "distill-losses", *INTEGRATIONS)
PLOTS = {
    "latency": "Latency of an encoder by sequence length and batch",
    "profile": "Time of an encoder by part",
    "ffn": "Speed-up of the feed-forward block by rows",
    "layers": "Speed-up by layer and rows",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to write into")
    docs = ROOT / "docs" / "integrations.md"
    parser.add_argument("--integrations", type=Path, default=docs, help="file for the tables of the integrations")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = parser.parse_args()
    if not arguments.check:
        from bench.plots import plot_all

        plot_all(arguments.results)
    pages = {arguments.readme: render, arguments.integrations: render_integrations}
    for page, make in pages.items():
        old = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
        new = fill(old, make(arguments.results))
        if arguments.check:
            if new != old:
                sys.exit(f"{page} is not what {arguments.results} gives: run python -m bench.report")
            continue
        temporary = page.with_name(f".{page.name}")
        temporary.write_text(new, encoding="utf-8")
        os.replace(temporary, page)


def fill(readme: str, results: str) -> str:
    """The README with what stands between the markers replaced; ValueError where they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"readme: expected {BEGIN!r} and {END!r} once each")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{results}{END}{after}"


def render(results: Path) -> str:
    """Everything that the result files say, as Markdown."""
    files = {name: read_rows(results / f"{name}.csv") for name in FILES}
    everything = [row for name in FILES for row in files[name]]
    # Measured last, shown first.
    newest = sorted(everything, key=lambda row: row["date"], reverse=True)
    machines = list(dict.fromkeys(machine_of(row) for row in newest))
    accuracy = accuracy_parts(results)
    if not machines and not accuracy:
        return f"\n{NONE_YET}\n\n"
    parts = [
        f"![{title}]({link(results / f'{name}.png')})"
        for name, title in PLOTS.items()
        if (results / f"{name}.png").exists()
    ]
    parts += accuracy
    for machine in machines:
        mine = {name: [row for row in rows if machine_of(row) == machine] for name, rows in files.items()}
        parts += _machine_section(machine, mine)
    return "\n" + "\n\n".join(parts) + "\n\n"


def render_integrations(results: Path) -> str:
    """The tables of the integrations alone, a machine after the other."""
    files = {name: read_rows(results / f"{name}.csv") for name in INTEGRATIONS}
    machines = dict.fromkeys(machine_of(row) for rows in files.values() for row in rows)
    parts = []
    for machine in machines:
        mine = {name: [row for row in rows if machine_of(row) == machine] for name, rows in files.items()}
        parts += ["**{}, {} cores, kernels at {}**".format(*(machine[at] for at in (0, 2, 1)))]
        parts += _integration_parts(mine)
    return "\n" + "\n\n".join(parts or [NONE_YET]) + "\n\n"


def _integration_parts(files: dict[str, list[Row]]) -> list[str]:
    return [
        *lokr_parts(files["integrations-lokr"]),
        *gpt2_parts(files["integrations-gpt2"]),
        *orders_parts(files["integrations-orders"]),
        *transform_parts(files["integrations-transform"]),
    ]


def _machine_section(machine: tuple[str, ...], files: dict[str, list[Row]]) -> list[str]:
    cpu, isa, cores, threads = machine
    layers, ffn, model = files["layers"], files["ffn"], files["model"]
    rows = [row for name in FILES for row in files[name]]
    dates = sorted({row["date"] for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    # A range needs two ends.
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    parts = [
        f"### {cpu}, {cores} cores, kernels at {isa}",
        f"{threads} threads, Python {rows[0]['python']}, torch {rows[0]['torch']}, {when}, "
        f"measured at commit {commits}. Times faster than dense torch computing the same, biases included: the "
        "median over the rounds of one interleaved run. ✓ and ✗ say whether the reach set for it was met; "
        "a figure without either had none. Every way was checked against float64 before it was timed.",
        *encoder_parts(model),
        *process_parts(files["process"]),
        *profile_parts(files["profile"]),
        *step_parts(files["distill-steps"]),
        *attention_parts(files["distill-losses"]),
        *_integration_parts(files),
        *layer_parts(ffn, "FFN block (W1, GELU, W2)"),
        *layer_parts(layers, "Layers"),
    ]
    if layers and not peak_in_rounds(layers):
        parts.append(
            "The GEMM peak of these layers was taken once, at the start of the run; where the machine's speed moved "
            "afterwards the shares of it are off."
        )
    if files["memory"]:
        parts += ["**Peak memory of forward beyond the output, MiB**", memory_table(files["memory"])]
    judged = [
        *judged_encoders(model),
        *judged_processes(files["process"]),
        *judged_steps(files["distill-steps"]),
        *judged_lokr(files["integrations-lokr"]),
        *judged_gpt2(files["integrations-gpt2"]),
        *judged_layers(ffn),
        *judged_layers(layers),
    ]
    missed = [each for each in judged if each.verdict.missed]
    if missed:
        title = f"**What falls short** ({len(missed)} of {len(judged)} figures with a reach)"
        parts += [title, missed_table(missed)]
    untimed = [
        *troubles(layers, "case"),
        *troubles(ffn, "case"),
        *troubles(model, "dtype"),
        *troubles(files["distill-steps"], "size"),
    ]
    if untimed:
        parts.append(details("Not timed, and why", markdown(("variant", "", "why", "of", "points"), untimed)))
    return parts


if __name__ == "__main__":
    main()
