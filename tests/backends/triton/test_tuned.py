"""Tuned tiles: look-up by class, the note where there are none, and files that are broken."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kron_kernels.backends.triton import tuned
from kron_kernels.backends.triton.tiles import TinyProduct, matmul_tiles

pytestmark = pytest.mark.quick
W1 = TinyProduct(1, 8, 2, 384, 384, False)
KEY = "matmul_kernel 1x8x2x512x512x0x1x0x0 e2 T4096"
BETTER = {"tokens": 128, "columns": 32, "depth": 16, "num_warps": 8, "num_stages": 5}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "_noted", set())
    tuned.forget()
    yield tmp_path
    tuned.forget()


def write(folder: Path, entries: Any, **other: Any) -> None:
    (folder / "sm_90.json").write_text(json.dumps({"version": 1, "entries": entries, **other}))
    tuned.forget()


def look_up(tokens: int = 4096, arch: int = 90) -> dict[str, int]:
    return matmul_tiles(arch, W1, tokens, 2, True, False, False)._asdict()


def test_a_class_takes_its_tiles_on_its_chip(folder: Path) -> None:
    default = look_up()
    assert default != BETTER
    write(folder, {KEY: {"tiles": BETTER, "us": 9.5}})
    assert look_up(4096) == look_up(8192) == BETTER
    assert look_up(128) != BETTER
    assert look_up(arch=80) == default
    with tuned.watching() as seen, tuned.overriding({KEY: default}):
        assert look_up() == default
    assert [each.key for each in seen] == [KEY]
    assert look_up() == BETTER


def test_missing_tiles_are_noted_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, tuned.__name__)
    for _ in range(2):
        tuned.forget()
        look_up()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert f"no tuned tiles for {KEY} on sm_90" in caplog.text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({KEY: {}}, "tiles: expected a mapping from name to number, got None"),
        ({KEY: {"tiles": {"tokens": 64}}}, "tiles: expected tokens, columns, depth, num_warps, num_stages, got tokens"),
        ({KEY: {"tiles": {**BETTER, "columns": 48}}}, "tiles.columns: expected a power of two, got 48"),
        ([], "expected version 1 and a mapping of entries"),
    ],
)
def test_broken_files_are_named(entries: Any, message: str, folder: Path) -> None:
    write(folder, entries)
    with pytest.raises(ValueError, match=r"sm_90\.json: ") as error:
        look_up()
    assert message in str(error.value)
