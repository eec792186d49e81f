"""Tables of the integrations: LoKr adapters, layers and text of GPT-2, online transforms with int8 results."""

from __future__ import annotations

from collections.abc import Iterator

from bench.harness import Row
from bench.tables import Judged, details, figure, markdown, number, with_range
from bench.targets import Verdict, lokr_reach, terms_reach, text_reach

OURS, PEFT, DENSE, BYPASS = "kron_kernels", "PEFT", "dense", "LyCORIS, bypass"
EINSUMS = ("over_a_first", "over_b_first")
Found = dict[str, Row]


def _by_point(rows: list[Row], *columns: str, way: str = "variant") -> dict[tuple[str, ...], Found]:
    """The rows that were timed, by their ways, for each point in the order of the file."""
    points: dict[tuple[str, ...], Found] = {}
    for row in rows:
        if row["status"] == "ok":
            points.setdefault(tuple(row[name] for name in columns), {})[row[way]] = row
    return points


def _times(other: Row | None, ours: Row, column: str) -> str:
    """How many times longer another way takes, by the medians of one run."""
    if other is None:
        return "-"
    return f"{float(other[column]) / float(ours[column]):.2f}"


LOKR_POINT = ("dtype", "direction", "tokens", "part", "layer", "adapter")


def lokr_parts(rows: list[Row]) -> list[str]:
    """Speed and memory of LoKr layers over PEFT, beside what the operations allow; few tokens and forward folded."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for point, found in _by_point(rows, *LOKR_POINT).items():
        dtype, direction, tokens, part, layer, adapter = point
        ours = found.get(OURS)
        if ours is None:
            continue
        line = (
            f"{layer.replace('-', ' → ')}, {adapter}",
            "with its layer" if part == "layer" else "alone",
            number(ours, "time_ms_q50"),
            _with_verdict(ours, "over_peft", lokr_reach(ours)[0]),
            number(ours, "ceiling", ".1f"),
            _times(found.get(BYPASS), ours, "time_ms_q50"),
            figure(ours),
            figure(ours, "over_base"),
            _mib(ours),
            _mib(found.get(PEFT)),
            str(_memory(found) or "-"),
        )
        tables.setdefault((dtype, direction, tokens), []).append(line)
    headers = (
        *("layer, second factor", "adapter", "ours, ms", "over PEFT", "operations allow", "over LyCORIS's bypass"),
        *("over full fine-tuning", "over the frozen layer", "memory, MiB", "PEFT's, MiB", "share"),
    )
    parts = []
    for index, ((dtype, direction, tokens), lines) in enumerate(tables.items()):
        title = f"LoKr adapters, {dtype}, {direction}, {tokens} tokens"
        table = markdown(headers, lines)
        parts += [details(title, table)] if index else [f"**{title}**, of factor 8 on a frozen layer. {LOKR}", table]
    return parts


LOKR = (
    "Ours is PEFT's own layer after `apply_kron_kernels_to_peft`. PEFT multiplies three products of the layer's size "
    "for the adapter; the frozen layer itself takes two more, which no adapter can spare: with its layer, a free "
    "adapter would be as many times faster than PEFT as the operations allow. Memory is the growth of the process over "
    "a call beyond the frozen layer's own, results included."
)


def _with_verdict(row: Row, prefix: str, reach: float | None) -> str:
    if figure(row, prefix) == "-":
        return "-"
    mark = str(Verdict(float(row[f"{prefix}_q50"]), reach)).partition(" ")[2]
    return f"{with_range(row, prefix)} {mark}".strip()


def _memory_column(row: Row) -> str:
    return "adapter_mib" if row["part"] == "layer" else "peak_mib"


def _mib(row: Row | None) -> str:
    return "-" if row is None else number(row, _memory_column(row))


def _memory(found: Found) -> Verdict | None:
    """Our share of PEFT's memory."""
    ours, peft = found.get(OURS), found.get(PEFT)
    if ours is None or peft is None or not ours[_memory_column(ours)] or not peft[_memory_column(peft)]:
        return None
    share = float(ours[_memory_column(ours)]) / float(peft[_memory_column(peft)])
    return Verdict(share, lokr_reach(ours)[1], at_most=True)


def judged_lokr(rows: list[Row]) -> Iterator[Judged]:
    """Figures of LoKr that had a reach."""
    for point, found in _by_point(rows, *LOKR_POINT).items():
        ours = found.get(OURS)
        if ours is None:
            continue
        _, direction, tokens, part, layer, adapter = point
        what = "LoKr with its layer, over PEFT" if part == "layer" else "LoKr alone, over PEFT"
        at = f"{layer.replace('-', ' → ')}, {adapter}, {direction}, T = {tokens}"
        if figure(ours, "over_peft") != "-":
            verdict = Verdict(float(ours["over_peft_q50"]), lokr_reach(ours)[0])
            note = f"operations allow {float(ours['ceiling']):.1f}"
            yield Judged(what, at, with_range(ours, "over_peft"), verdict, note)
        if memory := _memory(found):
            yield Judged(what.replace("over", "share of the memory of"), at, f"{memory.value:.2f}", memory)


def gpt2_parts(rows: list[Row]) -> list[str]:
    """Layers of several terms over the better einsum, and text of whole models."""
    lines, texts = [], []
    for point, found in _by_point(rows, "case", "direction", "tokens").items():
        case, direction, tokens = point
        if direction == "generation":
            for name, row in found.items():
                speed = number(row, "tokens_per_second", ".1f")
                texts.append((name, speed, "1" if name == DENSE else _with_verdict(row, "speedup", text_reach())))
        elif ours := found.get(OURS):
            best = _better_einsum(ours)
            shown = _with_verdict(ours, best, terms_reach()) if best else "-"
            factors = ours["factors"].replace("(x)", "⊗")
            lines.append((case, factors, direction, tokens, f"{float(ours['saving']):.2f}", shown, with_range(ours)))
    parts = []
    if lines:
        headers = ("layer", "factors", "", "T", "operations saved", "over the better einsum", "over dense")
        parts += [
            "**Layers of GPT-2 by KnGPT2's and TQCompressor's factors, float32.** " + GPT2,
            markdown(headers, lines),
        ]
    if texts:
        headers = ("model", "tokens a second", "over dense")
        parts += [
            "**Text from GPT-2 small**, random weights, float32, batch 1, 32 tokens after a prompt of 32",
            markdown(headers, texts),
        ]
    return parts


GPT2 = "The published code multiplies by two einsums a term; both orders were timed, and the better is meant."


def _better_einsum(ours: Row) -> str:
    """The column of our speed-up over the quicker einsum; "" where none was timed."""
    timed = [name for name in EINSUMS if ours.get(f"{name}_q50")]
    return min(timed, key=lambda name: float(ours[f"{name}_q50"]), default="")


def judged_gpt2(rows: list[Row]) -> Iterator[Judged]:
    """Figures of GPT-2 that had a reach."""
    for (case, direction, tokens), found in _by_point(rows, "case", "direction", "tokens").items():
        if direction == "generation":
            for name, row in found.items():
                if name != DENSE:
                    verdict = Verdict(float(row["speedup_q50"]), text_reach())
                    yield Judged("text from GPT-2 small, over dense", name, with_range(row), verdict)
        elif (ours := found.get(OURS)) and (best := _better_einsum(ours)):
            verdict = Verdict(float(ours[f"{best}_q50"]), terms_reach())
            note = f"operations saved: {float(ours['saving']):.2f}"
            yield Judged(
                f"{case}, over the better einsum", f"{direction}, T = {tokens}", with_range(ours, best), verdict, note
            )


def orders_parts(rows: list[Row]) -> list[str]:
    """Errors of the nearest factors in the order that is there and in the one found."""
    lines = [
        (
            row["weights"].replace("192x96", "192×96"),
            row["pair"].replace("(x)", "⊗"),
            *(row[name] for name in ("count", "rounds")),
            *(number(row, name, ".3f") for name in ("before", "after")),
        )
        for row in rows
    ]
    if not lines:
        return []
    title = "**Orders of channels**: mean relative error of the nearest factors, one search from one seed each"
    return [title, markdown(("weights", "pairs", "how many", "rounds", "before", "after"), lines)]


def transform_parts(rows: list[Row]) -> list[str]:
    """Every way of an online transform over two matmuls and torch's own rounding."""
    points = _by_point(rows, "case", "dtype", "tokens", way="way")
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [
        (f"{case}: {left} ⊗ {right}", dtype, tokens, *(with_range(found.get(way)) for way in ways[1:]))
        for (case, dtype, tokens), found in points.items()
        for left, right in [_sides(next(iter(found.values())))]
    ]
    if not lines:
        return []
    title = f"**Online transforms with int8 results a token** (FlatQuant's form), times faster than {ways[0]}"
    return [title, markdown(("width", "dtype", "T", *ways[1:]), lines)]


def _sides(row: Row) -> tuple[str, str]:
    return tuple(f"{row[name]}x{row[name]}" for name in ("left", "right"))  # type: ignore[return-value]
