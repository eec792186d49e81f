"""Tuned tiles, looked up by chip, kernel, sizes, bytes of an element and number of tokens. No Triton here.

``tuned/<chip>.json`` holds what the tuner found; a folder that the environment variable
``KRON_KERNELS_TRITON_CONFIGS`` names comes first. A look-up measures nothing: a class without an entry takes its
default tiles, which one line of the log says.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

FOLDER = Path(__file__).with_name("tuned")
VARIABLE = "KRON_KERNELS_TRITON_CONFIGS"
VERSION = 1
# Numbers of tokens that stand for a range each, and the bounds between those.
TOKENS = (16, 128, 1024, 4096, 32768)
_BOUNDS = (32, 512, 2048, 12288)

_log = logging.getLogger(__name__)


class TilesLike(Protocol):
    """A NamedTuple of integers: block sizes, warps, stages."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    def _asdict(self) -> dict[str, Any]: ...


TilesT = TypeVar("TilesT", bound=TilesLike)


class Entry(NamedTuple):
    """Tiles of one class, and microseconds with them and with the default tiles: None where not measured."""

    tiles: dict[str, int]
    us: float | None = None
    default_us: float | None = None


class LookUp(NamedTuple):
    """One look-up, as ``watching`` keeps it."""

    key: str
    default: Any


_overrides: dict[str, Mapping[str, int]] = {}
_watcher: list[LookUp] | None = None
_noted: set[tuple[str, str]] = set()
# Called when tiles change: caches of plans that hold them.
on_change: list[Callable[[], None]] = []


def chip_name(arch: int | str) -> str:
    """The stem of a chip's file: "sm_90" of 90, "gfx942" of itself."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def key_of(kernel: str, sizes: Sequence[int], element: int, tokens: int) -> str:
    """The class of a problem: tiny sizes as they are, others rounded up to a power of two, tokens to a range."""
    rounded = (size if size <= 16 else 1 << (size - 1).bit_length() for size in map(int, sizes))
    span = TOKENS[sum(tokens > bound for bound in _BOUNDS)]
    return f"{kernel} {'x'.join(map(str, rounded))} e{element} T{span}"


def tuned(kernel: str, sizes: Sequence[int], element: int, tokens: int, arch: int | str, default: TilesT) -> TilesT:
    """The tiles of the class that the problem is in; ``default`` where none are known.

    Raises ValueError for a broken file, naming it and the key.
    """
    key = key_of(kernel, sizes, element, tokens)
    if _watcher is not None:
        _watcher.append(LookUp(key, default))
    if key in _overrides:
        return type(default)(**_overrides[key])
    path, entries = _entries(chip_name(arch))
    entry = entries.get(key)
    if entry is None:
        _note(chip_name(arch), key, bool(entries))
        return default
    if tuple(entry.tiles) != default._fields:
        fields = ", ".join(default._fields)
        raise ValueError(f"{path}: entries[{key!r}].tiles: expected {fields}, got {', '.join(entry.tiles)}")
    return type(default)(**entry.tiles)


def tunable(kernel: str) -> Callable[[Callable[..., TilesT]], Callable[..., TilesT]]:
    """Makes a function of default tiles, ``(product, tokens, element, *flags)``, one of ``(arch, product, ...)``.

    The new one looks up before it takes the default, and remembers what it found.
    """

    def decorate(default: Callable[..., TilesT]) -> Callable[..., TilesT]:
        @functools.cache
        def tiles(arch: int | str, product: Sequence[int], tokens: int, element: int, *flags: int) -> TilesT:
            found = default(product, tokens, element, *flags)
            return tuned(kernel, (*product, *flags), element, tokens, arch, found)

        on_change.append(tiles.cache_clear)
        return functools.wraps(default)(tiles)

    return decorate


def _note(chip: str, key: str, known: bool) -> None:
    if not known and (chip, "") not in _noted:
        _noted.add((chip, ""))
        _log.warning(
            "no tuned tiles for %s: taking the default ones. To tune: python -m kron_kernels.backends.triton.tune", chip
        )
    if (chip, key) not in _noted:
        _noted.add((chip, key))
        _log.info("no tuned tiles for %s on %s", key, chip)


@contextmanager
def overriding(tiles: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Inside, the classes named take these tiles."""
    global _overrides
    before = _overrides
    _overrides = {**before, **tiles}
    _changed()
    try:
        yield
    finally:
        _overrides = before
        _changed()


@contextmanager
def watching() -> Iterator[list[LookUp]]:
    """Inside, every look-up is kept in the list."""
    global _watcher
    before, _watcher = _watcher, []
    _changed()
    try:
        yield _watcher
    finally:
        _watcher = before


def reload() -> None:
    """Read the files anew at the next look-up."""
    _entries.cache_clear()
    _changed()


def _changed() -> None:
    for clear in on_change:
        clear()


@functools.cache
def _entries(chip: str) -> tuple[Path, dict[str, Entry]]:
    for folder in (os.environ.get(VARIABLE), FOLDER):
        if folder and (path := Path(folder) / f"{chip}.json").is_file():
            return path, read(path)
    return FOLDER / f"{chip}.json", {}


def read(path: Path) -> dict[str, Entry]:
    """The entries of a file by class. Raises ValueError, naming file and key, where it is not as it should be."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        got = data.get("version") if isinstance(data, dict) else data
        raise ValueError(f"{path}: version: expected {VERSION}, got {got!r}")
    entries = data.get("entries")
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: entries: expected a mapping from class to entry, got {entries!r}")
    return {key: _entry(f"{path}: entries[{key!r}]", entry) for key, entry in entries.items()}


def _entry(where: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or not isinstance(entry.get("tiles"), dict):
        raise ValueError(f"{where}.tiles: expected a mapping from name to number, got {entry!r}")
    if unknown := sorted(set(entry) - set(Entry._fields)):
        raise ValueError(f"{where}: expected {', '.join(Entry._fields)}, got {', '.join(unknown)}")
    for name, value in entry["tiles"].items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        # Blocks and warps come in powers of two, stages in any number.
        if not whole or (name != "num_stages" and value & (value - 1)):
            expected = "a positive integer" if name == "num_stages" else "a power of two"
            raise ValueError(f"{where}.tiles.{name}: expected {expected}, got {value!r}")
    for name in ("us", "default_us"):
        if not isinstance(entry.get(name), (int, float, type(None))):
            raise ValueError(f"{where}.{name}: expected a number, got {entry[name]!r}")
    return Entry(**entry)


def dumps(chip: str, measured_on: Mapping[str, str], entries: Mapping[str, Entry]) -> str:
    """The text of a file; ``measured_on``: device, versions, commit, date."""
    listed = {key: {name: v for name, v in entry._asdict().items() if v is not None} for key, entry in entries.items()}
    data = {"version": VERSION, "chip": chip, **measured_on, "entries": dict(sorted(listed.items()))}
    return json.dumps(data, indent=1) + "\n"
