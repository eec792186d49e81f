"""The search for the tiles of a class: candidates around the default ones, what compiles well, what is fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .configs import Entry, LookUp, overriding, watching
from .launch import Device, Launch, recording
from .offline import Report

Tiles = dict[str, int]
# Starts a problem's op, whatever that is, on given operands.
Start = Callable[[], object]

_WARPS = (4, 8)
_STAGES = (1, 2, 3, 4)
_MOST = 256
# What is no size of a block, and its values.
_CHOICES = {"kernels": (1, 2)}
# Of the tiles tried with the default warps and stages, how many go on to others.
_KEPT = 3


class Tools(NamedTuple):
    """What a search asks of the machine.

    ``compile``: what became of launches. ``seconds``: the time of all launches of an op, one after another. ``wrong``:
    why the op's result is not right with the tiles in force, "" where it is.
    """

    device: Device
    compile: Callable[[Sequence[Launch]], Sequence[Report | RuntimeError]]
    seconds: Callable[[Sequence[Launch]], float]
    wrong: Callable[[], str]


def look_ups(start: Start, device: Device) -> list[LookUp]:
    """The classes whose tiles an op looks up, each once."""
    with watching() as found, recording(device):
        start()
    return list({look_up.key: look_up for look_up in found}.values())


def launches_with(look_up: LookUp, tiles: Mapping[str, int], start: Start, device: Device) -> list[Launch]:
    """The op's launches with other tiles for a class."""
    with overriding({look_up.key: tiles}), recording(device) as launches:
        start()
    return launches


def search(look_up: LookUp, start: Start, tools: Tools) -> Entry | None:
    """The fastest tiles with which the op is right; None where not even the default ones are."""
    default = look_up.default._asdict()
    times: dict[tuple[int, ...], float] = {}
    # Of launches that other tiles leave alone nothing need be asked.
    settled: set[tuple[Any, ...]] = set()

    def measure(candidates: Sequence[Tiles]) -> None:
        new = {tuple(tiles.values()): tiles for tiles in candidates if tuple(tiles.values()) not in times}
        times.update(_times(look_up, list(new.values()), start, tools, settled))

    measure([default])
    settled |= {_code(launch) for launch in launches_with(look_up, default, start, tools.device)}
    measure(list(blocks_around(default)))
    best = sorted(times, key=lambda values: times[values])[:_KEPT]
    measure([tiles for values in best for tiles in warps_and_stages(dict(zip(default, values, strict=True)))])
    for values in sorted(times, key=lambda values: times[values]):
        tiles = dict(zip(default, values, strict=True))
        with overriding({look_up.key: tiles}):
            if times[values] < float("inf") and not tools.wrong():
                of_default = times[tuple(default.values())]
                return Entry(tiles, 1e6 * times[values], None if of_default == float("inf") else 1e6 * of_default)
    return None


def _times(
    look_up: LookUp, candidates: Sequence[Tiles], start: Start, tools: Tools, settled: set[tuple[Any, ...]]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Seconds with each candidate; infinite where it does not compile, spills, needs too much, or fails to start."""
    ops = [_launches_or_none(look_up, tiles, start, tools.device) for tiles in candidates]
    asked = {_code(launch): launch for launches in ops for launch in launches or () if _code(launch) not in settled}
    reports = dict(zip(asked, tools.compile(list(asked.values())), strict=True))
    for tiles, launches in zip(candidates, ops, strict=True):
        seconds = float("inf")
        if launches is not None and all(
            _code(launch) in settled or acceptable(reports[_code(launch)], tools.device) for launch in launches
        ):
            try:
                seconds = tools.seconds(launches)
            except RuntimeError:  # too much of what only the device knows of
                seconds = float("inf")
        yield tuple(tiles.values()), seconds


def _launches_or_none(look_up: LookUp, tiles: Tiles, start: Start, device: Device) -> list[Launch] | None:
    try:
        return launches_with(look_up, tiles, start, device)
    except (ArithmeticError, RuntimeError, ValueError):  # a launcher that cannot work with such tiles
        return None


def _code(launch: Launch) -> tuple[Any, ...]:
    """Different for launches of one op that run different code."""
    return launch.kernel, launch.constants, launch.options, *(argument is None for argument in launch.arguments)


def acceptable(report: Report | RuntimeError, device: Device) -> bool:
    """Whether a kernel compiled to something worth timing."""
    if isinstance(report, RuntimeError):
        return False
    return report.stack + report.local == 0 and report.shared <= device.shared


def blocks_around(tiles: Tiles) -> Iterator[Tiles]:
    """Block sizes of a half, once and twice those given: blocks of products stay at 16 and above."""

    def sizes(name: str) -> Sequence[int]:
        least = 16 if tiles[name] >= 16 else 1
        around = (tiles[name] // 2, tiles[name], tiles[name] * 2)
        return _CHOICES.get(name) or [size for size in around if least <= size <= _MOST]

    names = [name for name in tiles if not name.startswith("num_")]
    for blocks in itertools.product(*map(sizes, names)):
        yield {**tiles, **dict(zip(names, blocks, strict=True))}


def warps_and_stages(tiles: Tiles) -> Iterator[Tiles]:
    """The same blocks with other numbers of warps and stages; nothing where tiles are but a choice of kernels."""
    if "num_warps" not in tiles:
        return
    for warps, stages in itertools.product(_WARPS, _STAGES):
        yield {**tiles, "num_warps": warps, "num_stages": stages}
