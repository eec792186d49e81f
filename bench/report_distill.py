"""Tables of distillation: time and memory of a training step over stock torch's layers, and of its attention terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.harness import Row
from bench.tables import Judged, details, figure, markdown, number, with_range
from bench.targets import Verdict, step_reach

OURS, DENSE = "kron_kernels", "dense"
# Factored layers of stock torch, and the columns of our speed-up over each.
STOCK = {"matmul": "over_matmul", "matmul, compiled": "over_compiled"}


@dataclass(frozen=True)
class Step:
    """Our step beside the best of stock torch's: the quickest for the time, the smallest for the memory."""

    ours: Row
    dense: Row | None
    quickest: Row | None
    smallest: Row | None

    @property
    def point(self) -> str:
        row = self.ours
        return f"{row['size']}, {row['batch']} x {row['length']}, {row['preset']}"

    @property
    def time(self) -> Verdict | None:
        """Share of the quickest's time, the median over the rounds."""
        if self.quickest is None or figure(self.ours, self._over) == "-":
            return None
        return Verdict(1 / float(self.ours[f"{self._over}_q50"]), step_reach(self.ours)[0], at_most=True)

    @property
    def memory(self) -> Verdict | None:
        """Share of the smallest's memory."""
        if self.smallest is None or not self.ours["memory_mib"]:
            return None
        share = float(self.ours["memory_mib"]) / float(self.smallest["memory_mib"])
        return Verdict(share, step_reach(self.ours)[1], at_most=True)

    @property
    def time_with_range(self) -> str:
        low, middle, high = (1 / float(self.ours[f"{self._over}_{q}"]) for q in ("q90", "q50", "q10"))
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    @property
    def _over(self) -> str:
        assert self.quickest is not None
        return STOCK[self.quickest["variant"]]


def step_parts(rows: list[Row]) -> list[str]:
    """Shares of the best stock torch's time and memory, and the figures in full."""
    if not rows:
        return []
    lines = []
    for step in _steps(rows):
        lines.append(
            (
                step.point,
                number(step.ours, "time_ms_q50"),
                _named(step.quickest, "time_ms_q50"),
                step.time or "-",
                number(step.ours, "memory_mib"),
                _named(step.smallest, "memory_mib"),
                step.memory or "-",
                _named(step.dense, "time_ms_q50", "memory_mib"),
            )
        )
    headers = (
        *("student, batch", "ours, ms", "best stock torch, ms", "share", "ours, MiB", "best stock torch, MiB", "share"),
        "a dense student, ms and MiB",
    )
    return [
        "**A training step of distillation** in float32: teacher and student forward, all losses, backward, clipping "
        "and AdamW, the same but for the student's factored layers. Stock torch multiplies by the factors one after "
        "the other in the cheaper order, plain or under `torch.compile`; the time is a share of the quickest's, the "
        "memory of the smallest's. Memory is what three steps add to a process that has models and optimiser already.",
        markdown(headers, lines),
        details("Steps of distillation, all figures", _full_table(rows)),
    ]


def judged_steps(rows: list[Row]) -> list[Judged]:
    """Our figures that had a reach."""
    judged = []
    for step in _steps(rows):
        what = "step of distillation"
        if step.time is not None and step.time.reach is not None and step.quickest is not None:
            note = f"of the time of {step.quickest['variant']}"
            judged.append(Judged(what, step.point, step.time_with_range, step.time, note))
        if step.memory is not None and step.memory.reach is not None and step.smallest is not None:
            note = f"of the memory of {step.smallest['variant']}"
            judged.append(Judged(what, step.point, f"{step.memory.value:.2f}", step.memory, note))
    return judged


def attention_parts(rows: list[Row]) -> list[str]:
    """The attention terms from queries and keys beside those from whole scores."""
    if not rows:
        return []
    pairs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        shape = tuple(row[name] for name in ("term", "layers", "batch", "heads", "length", "head_size"))
        pairs.setdefault(shape, {})[row["way"]] = row
    lines = []
    for (term, layers, batch, heads, length, _), found in pairs.items():
        ours, plain = found.get("ours"), found.get("plain")
        lines.append(
            (
                f"{term}, {layers} layers of {heads} heads, {batch} x {length}",
                _either(plain, "time_ms_q50"),
                with_range(ours),
                _either(plain, "memory_mib"),
                _either(ours, "memory_mib"),
            )
        )
    headers = ("term", "whole scores, ms", "ours, times faster", "whole scores, MiB", "ours, MiB")
    return [
        "**The attention terms of distillation**, forward and backward: from the scores of all layers at once, as "
        "eager attention leaves them, and ours, from queries and keys.",
        details("By term", markdown(headers, lines)),
    ]


def _steps(rows: list[Row]) -> Iterator[Step]:
    """One for each size and preset that our step was right at."""
    points: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            points.setdefault((row["size"], row["preset"]), {})[row["variant"]] = row
    for found in points.values():
        if OURS in found:
            stock = [found[name] for name in STOCK if name in found]
            yield Step(found[OURS], found.get(DENSE), _least(stock, "time_ms_q50"), _least(stock, "memory_mib"))


def _least(rows: list[Row], column: str) -> Row | None:
    return min((row for row in rows if row[column]), key=lambda row: float(row[column]), default=None)


def _named(row: Row | None, *columns: str) -> str:
    """A row's figures, and whose they are unless it is dense's."""
    if row is None:
        return "-"
    figures = ", ".join(number(row, column) for column in columns)
    return figures if row["variant"] == DENSE else f"{figures} ({row['variant']})"


def _either(row: Row | None, column: str) -> str:
    """A figure, or what became of the row."""
    if row is None:
        return "-"
    return number(row, column) if row["status"] == "ok" else row["status"]


def _full_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(
            (
                f"{row['size']}, {row['batch']} x {row['length']}, {row['preset']}",
                row["variant"],
                f"{int(row['parameters']) / 1e6:.1f}M" if row["parameters"] else "-",
                number(row, "time_ms_q50", ".1f") if row["status"] == "ok" else row["status"],
                *(with_range(row, prefix) for prefix in ("speedup", *STOCK.values())),
                number(row, "memory_mib"),
                f"{float(row['error']):.1e}" if row["error"] else "-",
            )
        )
    headers = (
        *("student, batch", "layers", "parameters", "ms", "times faster than dense (10 % to 90 %)"),
        *(f"than {name}" for name in STOCK),
        *("MiB", "error"),
    )
    return markdown(headers, lines)
