"""Tuned tiles, looked up by chip, kernel, sizes, bytes of an element and number of tokens. No Triton here.

``tuned/<chip>.json`` holds what ``tools/tune_triton.py`` found; a folder that the environment variable
``KRON_KERNELS_TRITON_CONFIGS`` names comes first. A look-up measures nothing: a class of problems without an entry
takes its default tiles, which one line of the log says.
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
_TOKENS = (16, 128, 1024, 4096, 32768)
_BOUNDS = (32, 512, 2048, 12288)

_log = logging.getLogger(__name__)


class TilesLike(Protocol):
    """A NamedTuple of integers: block sizes, warps, stages."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    def _asdict(self) -> dict[str, Any]: ...


TilesT = TypeVar("TilesT", bound=TilesLike)


class LookUp(NamedTuple):
    """One look-up, as ``watching`` keeps it."""

    key: str
    default: Any


_overrides: dict[str, Mapping[str, int]] = {}
_watcher: list[LookUp] | None = None
_noted: set[tuple[str, str]] = set()
_caches: list[Callable[[], None]] = []


def chip_name(arch: int | str) -> str:
    """The stem of a chip's file: "sm_90" of 90, "gfx942" of itself."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def key_of(kernel: str, sizes: Sequence[int], element: int, tokens: int) -> str:
    """The class of a problem: tiny sizes as they are, others rounded up to a power of two, tokens to a range."""
    rounded = (size if size <= 16 else 1 << (size - 1).bit_length() for size in map(int, sizes))
    span = _TOKENS[sum(tokens > bound for bound in _BOUNDS)]
    return f"{kernel} {'x'.join(map(str, rounded))} e{element} T{span}"


def tunable(kernel: str) -> Callable[[Callable[..., TilesT]], Callable[..., TilesT]]:
    """Make a function of default tiles, ``(product, tokens, element, *flags)``, one of ``(arch, product, ...)``.

    The new one looks up before it takes the default, and remembers what it found. It raises ValueError for a broken
    file, naming it and the key.
    """

    def decorate(default: Callable[..., TilesT]) -> Callable[..., TilesT]:
        @functools.cache
        def tiles(arch: int | str, product: Sequence[int], tokens: int, element: int, *flags: int) -> TilesT:
            found = default(product, tokens, element, *flags)
            return _look_up(key_of(kernel, (*product, *flags), element, tokens), chip_name(arch), found)

        _caches.append(tiles.cache_clear)
        return functools.wraps(default)(tiles)

    return decorate


def _look_up(key: str, chip: str, default: TilesT) -> TilesT:
    if _watcher is not None:
        _watcher.append(LookUp(key, default))
    path, entries = _entries(chip)
    tiles = _overrides.get(key) or entries.get(key)
    if tiles is None:
        if not entries:
            _note(logging.WARNING, chip, f"no tuned tiles for {chip}: taking the defaults (tools/tune_triton.py tunes)")
        _note(logging.INFO, chip, f"no tuned tiles for {key} on {chip}")
        return default
    if tuple(tiles) != default._fields:
        expected = ", ".join(default._fields)
        raise ValueError(f"{path}: entries[{key!r}].tiles: expected {expected}, got {', '.join(tiles)}")
    return type(default)(**tiles)


def _note(level: int, chip: str, text: str) -> None:
    if (chip, text) not in _noted:
        _noted.add((chip, text))
        _log.log(level, text)


@contextmanager
def overriding(tiles: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Inside, the classes named take these tiles."""
    global _overrides
    before, _overrides = _overrides, {**_overrides, **tiles}
    forget()
    try:
        yield
    finally:
        _overrides = before
        forget()


@contextmanager
def watching() -> Iterator[list[LookUp]]:
    """Inside, every look-up is kept in the list."""
    global _watcher
    before, _watcher = _watcher, []
    forget()
    try:
        yield _watcher
    finally:
        _watcher = before


def forget() -> None:
    """Look up again: files and the plans that hold tiles of them."""
    _entries.cache_clear()
    for clear in _caches:
        clear()


@functools.cache
def _entries(chip: str) -> tuple[Path, dict[str, dict[str, int]]]:
    for folder in (os.environ.get(VARIABLE), FOLDER):
        if folder and (path := Path(folder) / f"{chip}.json").is_file():
            return path, {key: entry["tiles"] for key, entry in read(path).items()}
    return FOLDER / f"{chip}.json", {}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file by class, each with its ``tiles``.

    Raises ValueError, naming file and key, where it is not as it should be.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("entries"), dict):
        raise ValueError(f"{path}: expected version {VERSION} and a mapping of entries")
    for key, entry in data["entries"].items():
        tiles = entry.get("tiles") if isinstance(entry, dict) else None
        if not isinstance(tiles, dict):
            raise ValueError(f"{path}: entries[{key!r}].tiles: expected a mapping from name to number, got {tiles!r}")
        for name, value in tiles.items():
            # Blocks and warps come in powers of two, stages in any number.
            if type(value) is not int or value < 1 or (name != "num_stages" and value & (value - 1)):
                expected = "a positive integer" if name == "num_stages" else "a power of two"
                raise ValueError(f"{path}: entries[{key!r}].tiles.{name}: expected {expected}, got {value!r}")
    return data["entries"]
