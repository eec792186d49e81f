"""A suite whose candidates are right, wrong, missing, dead or hung, for the tests of the harness."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.suites import Missing, Point
from kron_kernels.testing.timing import Variant

COLUMNS = ("length",)
SECONDS = 0.001
NAMES = ("dense", "good", "wrong", "missing", "dies")


def points(quick: bool) -> list[Point]:
    return [Point("case", "forward", "fp32", size) for size in ("1", "2")]


def groups(point: Point) -> list[tuple[str, ...]]:
    return [NAMES, ("dense", "hangs")] if point.input == "2" else [NAMES]


def silence(name: str) -> float:
    return 1.0 if name == "hangs" else 60.0


class Problem:
    def error(self, candidate: Variant) -> float:
        candidate.run()
        return 1.0 if candidate.name == "wrong" else 0.0

    def tolerance(self, candidate: Variant) -> float:
        return 0.5

    def runner(self, candidate: Variant) -> Callable[[], object]:
        return candidate.run


def problem(point: Point) -> Problem:
    return Problem()


def candidate(problem: Problem, name: str) -> Variant:
    if name == "missing":
        raise Missing("not installed")
    actions = {"dies": functools.partial(os._exit, 7), "hangs": functools.partial(time.sleep, 60)}
    return Variant(name, actions.get(name, int))


def columns(problem: Problem, candidate: Variant, timings: Mapping[str, Any]) -> dict[str, int]:
    return {"length": len(candidate.name)}


def memory_names(point: Point) -> tuple[str, ...]:
    return ("good",) if point.input == "1" else ()


def memory(point: Point, name: str) -> int:
    return 3 * 2**20
