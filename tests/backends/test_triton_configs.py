"""Tuned tiles: look-up by class, the note where there are none, and files that are broken."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kron_kernels.backends.triton.configs import Entry, key_of, tuned

from kron_kernels.backends.triton import configs


class Tiles(NamedTuple):
    tokens: int
    columns: int
    num_warps: int
    num_stages: int


DEFAULT = Tiles(64, 64, 4, 3)
BETTER = {"tokens": 128, "columns": 32, "num_warps": 8, "num_stages": 5}
PROBLEM = ("mm", (1, 8, 2, 384, 384, True), 2, 4096)
KEY = "mm 1x8x2x512x512x1 e2 T4096"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path))
    monkeypatch.setattr(configs, "_noted", set())
    configs.reload()
    yield tmp_path
    configs.reload()


def write(folder: Path, entries: Any = None, **other: Any) -> None:
    data = {"version": 1, "entries": {KEY: {"tiles": BETTER}} if entries is None else entries, **other}
    (folder / "sm_90.json").write_text(json.dumps(data))
    configs.reload()


def test_a_class_rounds_large_sizes_and_tokens() -> None:
    assert key_of(*PROBLEM) == KEY
    assert key_of("mm", (1, 8, 2, 512, 257, True), 2, 2049) == KEY
    assert key_of("mm", (1, 8, 3, 384, 384, True), 2, 4096) == KEY.replace("x8x2x", "x8x3x")
    assert key_of("mm", (1, 8, 2, 384, 256, True), 2, 4096) != KEY
    spans = [key_of("mm", (), 2, tokens).split("T")[1] for tokens in (0, 1, 32, 33, 512, 513, 12288, 12289, 2**33)]
    assert spans == ["16", "16", "16", "128", "128", "1024", "4096", "32768", "32768"]


def test_known_classes_take_their_tiles(folder: Path) -> None:
    write(folder)
    assert tuned(*PROBLEM, 90, DEFAULT) == Tiles(**BETTER)
    assert tuned(*PROBLEM, 80, DEFAULT) is DEFAULT
    assert tuned("mm", (1, 8, 2, 384, 384, True), 4, 4096, 90, DEFAULT) is DEFAULT


def test_names_of_chips(folder: Path) -> None:
    assert configs.chip_name(90) == "sm_90"
    write(folder)
    (folder / "sm_90.json").rename(folder / "gfx942.json")
    configs.reload()
    assert tuned(*PROBLEM, "gfx942", DEFAULT) == Tiles(**BETTER)


def test_one_note_for_a_chip_and_for_a_class(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for tokens in (4096, 4000, 128, 4096):
        tuned("mm", (1, 8, 2, 384, 384, True), 2, tokens, 90, DEFAULT)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "no tuned tiles for sm_90: taking the default ones. To tune: python -m kron_kernels.backends.triton.tune",
        ),
        ("INFO", f"no tuned tiles for {KEY} on sm_90"),
        ("INFO", f"no tuned tiles for {KEY.replace('4096', '128')} on sm_90"),
    ]
    caplog.clear()
    write(folder)
    tuned(*PROBLEM, 90, DEFAULT)
    tuned("other", (), 2, 1, 90, DEFAULT)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_overriding_and_watching(folder: Path) -> None:
    changes: list[None] = []
    configs.on_change.append(lambda: changes.append(None))
    try:
        with configs.watching() as looked_up, configs.overriding({KEY: BETTER}):
            assert tuned(*PROBLEM, 80, DEFAULT) == Tiles(**BETTER)
        assert looked_up == [configs.LookUp(KEY, DEFAULT)]
        assert len(changes) == 3
        assert tuned(*PROBLEM, 80, DEFAULT) is DEFAULT
        assert len(looked_up) == 1
    finally:
        configs.on_change.pop()


def test_a_tunable_function_of_tiles(folder: Path) -> None:
    calls = []

    @configs.tunable("mm")
    def tiles(product: tuple[int, ...], tokens: int, element: int, flag: bool) -> Tiles:
        calls.append((product, tokens, element, flag))
        return DEFAULT

    try:
        call = (90, (1, 8, 2, 384, 384), 4096, 2, True)
        assert tiles(*call) is tiles(*call) is DEFAULT
        assert calls == [call[1:]]
        write(folder)
        assert tiles(*call) == Tiles(**BETTER)
        assert tiles(80, *call[1:]) is DEFAULT
        with configs.overriding({KEY: DEFAULT._asdict()}):
            assert tiles(*call) == DEFAULT
        assert tiles(*call) == Tiles(**BETTER)
    finally:
        configs.on_change.pop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "sm_90.json: not JSON: Expecting"),
        ("[]", r"sm_90.json: version: expected 1, got \[\]"),
        ('{"version": 2}', "sm_90.json: version: expected 1, got 2"),
        ('{"version": 1}', "sm_90.json: entries: expected a mapping from class to entry, got None"),
        ('{"version": 1, "entries": {"a": 3}}', r"entries\['a'\].tiles: expected a mapping from name to number, got 3"),
        (
            '{"version": 1, "entries": {"a": {"tiles": {}, "ms": 1}}}',
            r"entries\['a'\]: expected tiles, us, default_us, got ms",
        ),
        (
            '{"version": 1, "entries": {"a": {"tiles": {"columns": 48}}}}',
            r"sm_90.json: entries\['a'\].tiles.columns: expected a power of two, got 48",
        ),
        ('{"version": 1, "entries": {"a": {"tiles": {"columns": true}}}}', "tiles.columns: expected .*, got True"),
        (
            '{"version": 1, "entries": {"a": {"tiles": {"num_stages": 0}}}}',
            "tiles.num_stages: expected a positive integer, got 0",
        ),
        (
            '{"version": 1, "entries": {"a": {"tiles": {}, "us": "1"}}}',
            r"entries\['a'\].us: expected a number, got '1'",
        ),
    ],
)
def test_broken_files_are_named(folder: Path, text: str, message: str) -> None:
    (folder / "sm_90.json").write_text(text)
    configs.reload()
    with pytest.raises(ValueError, match=message):
        tuned(*PROBLEM, 90, DEFAULT)


def test_tiles_of_another_kernel_are_named(folder: Path) -> None:
    write(folder, {KEY: {"tiles": {"tokens": 64}}})
    with pytest.raises(
        ValueError, match=r"sm_90.json: entries\['mm .*'\].tiles: expected tokens, columns, .*, got tokens$"
    ):
        tuned(*PROBLEM, 90, DEFAULT)


def test_what_is_written_is_read(folder: Path) -> None:
    entries = {KEY: Entry(BETTER, 3.25, 4.0), "other  e2 T16": Entry({"num_warps": 4})}
    path = folder / "sm_90.json"
    path.write_text(configs.dumps("sm_90", {"device": "H200"}, entries))
    assert configs.read(path) == entries
    assert json.loads(path.read_text())["device"] == "H200"


def test_files_in_the_package_are_sound() -> None:
    for path in configs.FOLDER.glob("*.json"):
        assert configs.read(path), path


def test_it_needs_no_triton() -> None:
    code = "import sys; from kron_kernels.backends.triton import configs; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
