"""What bench.gpu makes of its rows: a plot, and which backend is the faster one for each call."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Row
from kron_kernels.backends import select
from kron_kernels.backends.base import Call
from kron_kernels.backends.triton.problems import DTYPES, EMBEDDINGS, FFNS, LAYERS, QKVS
from kron_kernels.compress.files import write_text
from kron_kernels.schemas.product import Product
from kron_kernels.testing.tables import save, subplots

_SHOWN = ("dense, compiled", "matmul", "matmul, compiled", "LyCORIS", "triton", "cuda")
Choices = dict[str, dict[str, dict[str, Any]]]


def products_of(case: str) -> tuple[Product, ...]:
    """The products of a case, as the choice of a backend sees them."""
    if case in EMBEDDINGS:
        rows, p, k = EMBEDDINGS[case]
        return (Product(1, rows, p, 1, k),)
    names = FFNS.get(case) or ((QKVS[case],) * 3 if case in QKVS else (case,))
    return tuple(Product(layer.terms, *layer.a, *layer.b) for layer in (LAYERS[name] for name in names))


def op_of(case: str, direction: str) -> str:
    """The op that a row's choice is about: of forward and backward together, the backward one."""
    name = "kron_ffn" if case in FFNS else "kron_qkv" if case in QKVS else "kron_matmul"
    if case in EMBEDDINGS:
        name = "kron_embedding"
    return f"{name}_backward" if direction != "forward" else name


def choices(rows: Iterable[Row], arch: int | str) -> Choices:
    """In the form of choices.json, for calls that both backends were right on."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if (
            row["status"] == "ok"
            and row["variant"] in select.NAMES
            and row["case"] in (*LAYERS, *FFNS, *QKVS, *EMBEDDINGS)
        ):
            key = (row["case"], row["direction"], row["dtype"], row["tokens"])
            times.setdefault(key, {})[row["variant"]] = float(row["time_us_q50"])
    found: Choices = {}
    for (case, direction, dtype, tokens), each in times.items():
        if len(each) < 2:
            continue
        fastest, second = sorted(each, key=lambda name: each[name])[:2]
        call = Call(op_of(case, direction), products_of(case), DTYPES[dtype], int(tokens))
        entry = {"backend": fastest, "over": second, "ratio": each[second] / each[fastest]}
        found.setdefault(f"{call} on {arch}", {})[str(select.token_class(int(tokens)))] = entry
    return found


def write_choices(path: Path, new: Choices) -> None:
    """Add to the file, or take the place of what stands there for the same calls."""
    if not new:
        return
    old: Choices = json.loads(path.read_text()) if path.is_file() else {}
    merged = {call: {**old.get(call, {}), **new.get(call, {})} for call in sorted({*old, *new})}
    write_text(path, json.dumps(merged, indent=1) + "\n")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speed-up over dense of each way by case, one panel for each number of tokens and direction."""
    measured = [row for row in rows if row["status"] == "ok" and row["speedup_q50"] and row["case"] in _plotted()]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        panels.setdefault((row["direction"], row["tokens"]), []).append(row)
    if not panels:
        return
    figure, axes = subplots(len(panels), 2, (9.0, 3.6))
    for axis, ((direction, tokens), shown) in zip(axes, panels.items(), strict=False):
        _draw(axis, shown)
        axis.set_title(f"{direction}, T = {tokens}, {shown[0]['dtype']}")
    save(figure, path)


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    by: Mapping[tuple[str, str], float] = {(row["case"], row["variant"]): float(row["speedup_q50"]) for row in rows}
    width = 0.8 / len(_SHOWN)
    for index, variant in enumerate(_SHOWN):
        places = [number for number, case in enumerate(cases) if (case, variant) in by]
        heights = [by[cases[number], variant] for number in places]
        axis.bar([number + index * width - 0.4 for number in places], heights, width, label=variant, align="edge")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(cases)), cases, rotation=45, ha="right", fontsize=7)
    axis.set_ylabel("times dense")
    axis.legend(fontsize=6)


def _plotted() -> tuple[str, ...]:
    return (*LAYERS, *FFNS, *QKVS, *EMBEDDINGS)
