"""Tables of the layer and feed-forward benchmarks, and of the memory of their forward."""

from __future__ import annotations

from bench.harness import Row
from bench.tables import Judged, details, figure, markdown, with_range
from bench.targets import Verdict, reach
from kron_kernels.testing import PEAK

STOCK = ("torch.kron + linear", "matmul B first", "matmul A first", "matmul", "matmul, compiled")
OTHERS = ("dense, packed", "dense, compiled", "kron_matmul twice", "LyCORIS", "PEFT", "FastKron")


def layer_parts(rows: list[Row], title: str) -> list[str]:
    """A table for each dtype, direction and state of the weights; the long ones folded."""
    parts = []
    for dtype, direction, weights in dict.fromkeys((row["dtype"], row["direction"], row["weights"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["direction"], row["weights"]) == (dtype, direction, weights)]
        if weights == "cold":
            cold = f"{title}, {dtype}, {direction}, weights of 12 layers in turn (cold)"
            parts.append(details(cold, speed_table(mine)))
        else:
            parts += [f"**{title}, {dtype}, {direction}**", speed_table(mine)]
            parts.append(details(f"Beside the others, {dtype}, {direction}", beside_table(mine)))
    return parts


def peak_in_rounds(rows: list[Row]) -> bool:
    """Whether the peak was taken in the rounds of the runs, not once at the start."""
    return any(row["variant"] == PEAK for row in rows)


def _tokens(rows: list[Row]) -> list[str]:
    return sorted({row["tokens"] for row in rows}, key=int)


def cases(rows: list[Row]) -> dict[str, Row]:
    """Case name -> one of its rows, in the order of the file."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["variant"] != PEAK:
            found.setdefault(row["case"], row)
    return found


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


def speed_table(rows: list[Row]) -> str:
    """Ours: a case a row, a number of tokens a column, and the share of the matrix-product peak at the largest."""
    tokens = _tokens(rows)
    lines = []
    for case, row in cases(rows).items():
        ours = [_find(rows, case, count, "kron_kernels") for count in tokens]
        share = next((f"{float(found['peak_share']):.0%}" for found in reversed(ours) if found), "-")
        figures = [str(verdict(found)) if found else "-" for found in ours]
        lines.append((case, row["factors"].replace("(x)", "⊗"), f"{float(row['saving']):.1f}", *figures, share))
    headers = ("layer", "factors", "operations saved", *(f"T = {count}" for count in tokens), "of GEMM peak")
    return markdown(headers, lines)


def beside_table(rows: list[Row]) -> str:
    """The same beside the others: best stock torch on the factors, other forms of dense, each peer."""
    names = [name for name in OTHERS if any(row["variant"] == name for row in rows)]
    lines = []
    for case in cases(rows):
        for count in _tokens(rows):
            ours = _find(rows, case, count, "kron_kernels")
            stock = [found for name in STOCK if (found := _find(rows, case, count, name))]
            best = max(stock, key=lambda row: float(row["speedup_q50"]), default=None)
            cells = [figure(_find(rows, case, count, name)) for name in names]
            stock_cell = f"{figure(best)} ({best['variant']})" if best else "-"
            lines.append((case, count, with_range(ours), stock_cell, *cells))
    headers = ("layer", "T", "kron_kernels (10 % to 90 %)", "best stock torch", *names)
    return markdown(headers, lines)


def memory_table(rows: list[Row]) -> str:
    """Peak memory of forward beyond the output."""
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
    return details("By layer", markdown(("layer", "dtype", "T", "output", *variants), lines))


def judged_layers(rows: list[Row]) -> list[Judged]:
    """Our figures that had a reach."""
    found = []
    for row in rows:
        if row["variant"] == "kron_kernels" and row["status"] == "ok" and verdict(row).reach is not None:
            point = f"{row['dtype']}, {row['direction']}, T = {row['tokens']}"
            note = f"{float(row['peak_share']):.0%} of GEMM peak"
            found.append(Judged(row["case"], point, with_range(row), verdict(row), note))
    return found


def troubles(rows: list[Row], what: str) -> list[tuple[object, ...]]:
    """Who was not timed: the reason, ``what`` it was to compute, and how many points. ``what`` names a column."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["status"] != "ok":
            name = row["variant"] if "variant" in row else row["model"]
            groups.setdefault((name, row["status"], row.get("reason") or ""), []).append(row)
    return [
        (name, status, reason, ", ".join(dict.fromkeys(row[what] for row in mine)), len(mine))
        for (name, status, reason), mine in groups.items()
    ]
