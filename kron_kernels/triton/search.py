"""The search for the tiles of one launch: candidates around the default ones, what compiles well, what is fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .configs import Entry, LookUp, overriding, watching
from .launch import Device, Launch, recording
from .offline import Report

Tiles = dict[str, int]
# Starts a problem's op, whatever that is, on given operands.
Start = Callable[[], object]

_WARPS = (4, 8)
_STAGES = (1, 2, 3, 4)
_MOST = 256
# Of the tiles tried with the default warps and stages, how many go on to others.
_KEPT = 3


class Tools(NamedTuple):
    """What a search asks of the machine.

    ``compile``: what became of launches. ``seconds``: the time of one. ``wrong``: why the op's result is not right with
    the tiles in force, "" where it is.
    """

    device: Device
    compile: Callable[[Sequence[Launch]], Sequence[Report | RuntimeError]]
    seconds: Callable[[Launch], float]
    wrong: Callable[[], str]


class Tunable(NamedTuple):
    """A launch whose tiles are looked up; ``nth`` counts the launches of its kernel in the op."""

    look_up: LookUp
    nth: int

    @property
    def kernel(self) -> str:
        return self.look_up.key.split()[0]


def tunables(start: Start, device: Device) -> list[Tunable]:
    """The launches of an op whose tiles are looked up, each class once."""
    with watching() as looked_up, recording(device):
        start()
    found: dict[str, Tunable] = {}
    counts: dict[str, int] = {}
    for look_up in looked_up:
        one = Tunable(look_up, counts.get(look_up.key.split()[0], 0))
        counts[one.kernel] = one.nth + 1
        found.setdefault(look_up.key, one)
    return list(found.values())


def launch_with(tunable: Tunable, tiles: Mapping[str, int], start: Start, device: Device) -> Launch:
    """The launch as it is with other tiles."""
    with overriding({tunable.look_up.key: tiles}), recording(device) as launches:
        start()
    of_kernel = [launch for launch in launches if launch.kernel.fn.__name__ == tunable.kernel]
    if tunable.nth >= len(of_kernel):
        names = ", ".join(launch.kernel.fn.__name__ for launch in launches)
        raise AssertionError(f"tiles of {tunable.look_up.key} were looked up, and the launches are {names}")
    return of_kernel[tunable.nth]


def search(tunable: Tunable, start: Start, tools: Tools) -> Entry | None:
    """The fastest tiles with which the op is right; None where not even the default ones are."""
    default = tunable.look_up.default._asdict()
    times: dict[tuple[int, ...], float] = {}

    def measure(candidates: Sequence[Tiles]) -> None:
        new = {tuple(tiles.values()): tiles for tiles in candidates if tuple(tiles.values()) not in times}
        times.update(_times(tunable, list(new.values()), start, tools))

    measure([default, *blocks_around(default)])
    best = sorted(times, key=lambda values: times[values])[:_KEPT]
    measure([tiles for values in best for tiles in warps_and_stages(dict(zip(default, values, strict=True)))])
    for values in sorted(times, key=lambda values: times[values]):
        tiles = dict(zip(default, values, strict=True))
        with overriding({tunable.look_up.key: tiles}):
            if times[values] < float("inf") and not tools.wrong():
                of_default = times[tuple(default.values())]
                return Entry(tiles, 1e6 * times[values], None if of_default == float("inf") else 1e6 * of_default)
    return None


def _times(
    tunable: Tunable, candidates: Sequence[Tiles], start: Start, tools: Tools
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Seconds with each candidate; infinite where it does not compile, spills, needs too much, or fails to start."""
    launches = [_launch_or_none(tunable, tiles, start, tools.device) for tiles in candidates]
    reports = iter(tools.compile([launch for launch in launches if launch is not None]))
    for tiles, launch in zip(candidates, launches, strict=True):
        seconds = float("inf")
        if launch is not None and acceptable(next(reports), tools.device):
            try:
                seconds = tools.seconds(launch)
            except RuntimeError:  # too much of what only the device knows of
                seconds = float("inf")
        yield tuple(tiles.values()), seconds


def _launch_or_none(tunable: Tunable, tiles: Tiles, start: Start, device: Device) -> Launch | None:
    try:
        return launch_with(tunable, tiles, start, device)
    except (ArithmeticError, RuntimeError, ValueError):  # a launcher that cannot work with such tiles
        return None


def acceptable(report: Report | RuntimeError, device: Device) -> bool:
    """Whether a kernel compiled to something worth timing."""
    if isinstance(report, RuntimeError):
        return False
    return report.stack + report.local == 0 and report.shared <= device.shared


def blocks_around(tiles: Tiles) -> Iterator[Tiles]:
    """Block sizes of a half, once and twice those given: blocks of products stay at 16 and above."""
    names = [name for name in tiles if not name.startswith("num_")]
    for factors in itertools.product((1, 2, 4), repeat=len(names)):
        blocks = {name: tiles[name] * factor // 2 for name, factor in zip(names, factors, strict=True)}
        if all((16 if tiles[name] >= 16 else 1) <= size <= _MOST for name, size in blocks.items()):
            yield {**tiles, **blocks}


def warps_and_stages(tiles: Tiles) -> Iterator[Tiles]:
    """The same blocks with other numbers of warps and stages."""
    for warps, stages in itertools.product(_WARPS, _STAGES):
        yield {**tiles, "num_warps": warps, "num_stages": stages}
