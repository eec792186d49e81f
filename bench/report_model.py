"""Tables of the encoder benchmark: speed beside other ways to a faster BERT, memory of the process, time by part."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness import Row
from bench.tables import Judged, details, figure, markdown, number, with_range
from bench.targets import Verdict, encoder_reach, process_reach

COMPILED = ", compiled"


def encoder_parts(rows: list[Row]) -> list[str]:
    """Ours with its reach, every way beside it, where another way wins, and the figures in full."""
    if not rows:
        return []
    parts = ["**BERT-base encoder** (real configuration, random weights: cost does not depend on the values)"]
    parts.append(_reach_table(rows))
    ways = _ways(rows)
    if any(name not in ("dense", *_presets(rows)) for name in ways):
        parts += [
            "Every way at every input, times faster than dense; the fastest in bold. int8 rounds the weights and "
            "activations: its error stands in the full table. Six layers in place of twelve are another model, which "
            "is checked against itself.",
            _ways_table(rows, ways),
        ]
        if wins := _wins(rows):
            parts += ["Where another way is faster than ours (the better of eager and compiled):", wins]
    parts.append(details("Encoder, all figures", _full_table(rows)))
    return parts


def _presets(rows: Sequence[Row]) -> list[str]:
    """The compressed models: theirs are the names of one word besides dense."""
    names = dict.fromkeys(row["model"].removesuffix(COMPILED) for row in rows)
    return [name for name in names if name != "dense" and " " not in name]


def _ways(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


Key = tuple[str, str, str, str]


def _points(rows: Sequence[Row]) -> dict[Key, dict[str, Row]]:
    """(dtype, batch, sequence, layers) -> the rows that were timed, by model."""
    points: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row["speedup_q50"]:
            points.setdefault((row["dtype"], row["batch"], row["sequence"], row["layers"]), {})[row["model"]] = row
    return dict(sorted(points.items(), key=lambda item: (item[0][0] != "fp32", int(item[0][1]), int(item[0][2]))))


def _input(key: Key) -> str:
    dtype, batch, sequence, _ = key
    return f"{dtype}, {batch} x {sequence}"


def _verdicts(preset: str, found: dict[str, Row]) -> tuple[Verdict | None, Verdict | None]:
    """Over dense, of the eager model; over compiled dense, of the better of ours, eager or compiled."""
    row = found.get(preset)
    over_dense = over_compiled = None
    if row is not None:
        over_dense = Verdict(float(row["speedup_q50"]), encoder_reach(row))
    best = _best(found, preset)
    if best is not None and best.get("over_compiled_q50"):
        over_compiled = Verdict(float(best["over_compiled_q50"]), encoder_reach(best, over_compiled=True))
    return over_dense, over_compiled


def _best(found: dict[str, Row], preset: str) -> Row | None:
    """The quicker of a compressed model's eager and compiled rows."""
    mine = [found[name] for name in (preset, preset + COMPILED) if name in found]
    return max(mine, key=lambda row: float(row["speedup_q50"]), default=None)


def _reach_table(rows: list[Row]) -> str:
    presets = _presets(rows)
    lines = []
    for key, found in _points(rows).items():
        cells: list[object] = [_input(key), number(found["dense"], "time_ms_q50", ".1f")]
        for preset in presets:
            cells += [verdict or "-" for verdict in _verdicts(preset, found)]
        lines.append(cells)
    columns = [title for preset in presets for title in (f"{preset} over dense", f"{preset} over compiled dense")]
    return markdown(("input", "dense, ms", *columns), lines)


def _ways_table(rows: list[Row], ways: list[str]) -> str:
    names = [name for name in ways if name != "dense"]
    lines = []
    for key, found in _points(rows).items():
        best = max(found.values(), key=lambda row: float(row["speedup_q50"]))
        cells = [f"**{figure(row)}**" if row is best else figure(row) for row in map(found.get, names)]
        lines.append((_input(key), *cells))
    return markdown(("input", *names), lines)


def _wins(rows: list[Row]) -> str:
    lines = []
    for preset in _presets(rows):
        ours = (preset, preset + COMPILED)
        won: dict[str, list[str]] = {}
        for key, found in _points(rows).items():
            best = _best(found, preset)
            for name, row in found.items():
                other_preset = name.removesuffix(COMPILED) in _presets(rows)
                if best is None or name in ours or other_preset:
                    continue
                if float(row["time_ms_q50"]) < float(best["time_ms_q50"]):
                    won.setdefault(name, []).append(_input(key))
        lines += [(name, preset, "; ".join(where)) for name, where in won.items()]
    return markdown(("faster", "than", "at"), lines) if lines else ""


def _full_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        timed = bool(row["speedup_q50"])
        lines.append(
            (
                f"{row['dtype']}, {row['batch']} x {row['sequence']}",
                row["layers"],
                row["model"],
                f"{int(row['parameters']) / 1e6:.1f}M" if row["parameters"] else "-",
                f"{float(row['time_ms_q50']):.1f}" if timed else row["status"],
                with_range(row),
                with_range(row, "over_compiled"),
                f"{float(row['error']):.1e}" if row["error"] else "-",
                number(row, "forward_peak_mib"),
            )
        )
    headers = (
        *("input", "layers", "model", "parameters", "ms", "over dense (10 % to 90 %)", "over compiled dense"),
        *("error", "peak memory of forward, MiB"),
    )
    return markdown(headers, lines)


def judged_encoders(rows: list[Row]) -> list[Judged]:
    """Our figures that had a reach."""
    judged = []
    for key, found in _points(rows).items():
        point = f"{_input(key)} tokens"
        for preset in _presets(rows):
            over_dense, over_compiled = _verdicts(preset, found)
            if over_dense is not None and over_dense.reach is not None:
                judged.append(Judged(f"{preset} encoder", point, with_range(found[preset]), over_dense))
            best = _best(found, preset)
            if over_compiled is not None and over_compiled.reach is not None and best is not None:
                shown = with_range(best, "over_compiled")
                judged.append(Judged(f"{preset} encoder", point, shown, over_compiled, "over compiled dense"))
    return judged


def process_parts(rows: list[Row]) -> list[str]:
    """Peak memory of whole processes, and without what imports alone take."""
    if not rows:
        return []
    lines = []
    for row, dense in _beside_dense(rows):
        whole, model = _memory_verdicts(row, dense)
        lines.append(
            (
                f"{row['dtype']}, {row['batch']} x {row['sequence']}",
                row["model"],
                *(number(row, column) for column in ("peak_mib", "imported_mib", "model_mib", "checkpoint_mib")),
                whole,
                f"{model:.2f}",
            )
        )
    headers = (
        *("input", "model", "peak", "imports alone", "what the model adds", "checkpoint"),
        *("peak over dense's", "what the model adds, over dense's"),
    )
    return [
        "**Memory of a process** that loads the checkpoint and runs it, MiB. Imports are Python, torch and "
        "transformers, which weigh the same whatever the model. A *package* is the model exported by "
        "`kron-kernels export --format aoti`, in a process without transformers; a *folder* is the checkpoint itself, "
        "run by `load_package`, without transformers too.",
        markdown(headers, lines),
    ]


def _beside_dense(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Each row that was measured, with the dense row of its point."""

    def point(row: Row) -> tuple[str, ...]:
        return row["dtype"], row["batch"], row["sequence"], row["layers"]

    measured = [row for row in rows if row["status"] == "ok"]
    dense = {point(row): row for row in measured if row["model"] == "dense"}
    return [(row, dense[point(row)]) for row in measured if point(row) in dense]


def _memory_verdicts(row: Row, dense: Row) -> tuple[Verdict, float]:
    wanted = process_reach(row)
    whole = Verdict(float(row["peak_mib"]) / float(dense["peak_mib"]), wanted, at_most=True)
    return whole, float(row["model_mib"]) / float(dense["model_mib"])


def judged_processes(rows: list[Row]) -> list[Judged]:
    """Our figures that had a reach."""
    judged = []
    for row, dense in _beside_dense(rows):
        whole, model = _memory_verdicts(row, dense)
        if whole.reach is not None:
            point = f"{row['dtype']}, {row['batch']} x {row['sequence']} tokens"
            note = f"{model:.2f} without the imports, {float(row['imported_mib']):.0f} MiB of {row['peak_mib']}"
            judged.append(Judged(f"{row['model']}, memory of the process", point, f"{whole.value:.2f}", whole, note))
    return judged


def profile_parts(rows: list[Row]) -> list[str]:
    """Milliseconds by part."""
    if not rows:
        return []
    parts = list(dict.fromkeys(row["part"] for row in rows))
    models: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["dtype"], row["batch"], row["sequence"], row["model"])
        models.setdefault(key, {})[row["part"]] = row
    lines = []
    for (dtype, batch, sequence, model), found in models.items():
        any_row = next(iter(found.values()))
        cells = [number(found[part], "time_ms", ".2f") if part in found else "-" for part in parts]
        gap = f"{float(any_row['gap']):+.0%}"
        lines.append((f"{dtype}, {batch} x {sequence}", model, *cells, number(any_row, "untraced_ms", ".2f"), gap))
    table = markdown(("input", "model", *parts, "untraced", "sum against untraced"), lines)
    return [
        "**Where the time goes**, milliseconds, by tracing the ops of a forward. A fused op counts whole where its "
        "product belongs: LayerNorms fused into the output projection or the FFN are counted there, the embedding's is "
        "always counted with it. *Framework* is what lies between the ops. The last column says by how much the parts "
        "together differ from a forward that is not traced.",
        details("By part", table),
    ]
