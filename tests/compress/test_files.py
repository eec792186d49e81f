"""Folders that appear whole or not at all: whatever fails, whoever else writes, wherever the process is killed."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from kron_kernels.compress import files
from kron_kernels.compress.files import NoSpaceError, check_space, new_folder


def write(path: Path, text: str) -> None:
    with new_folder(path) as folder:
        for name in ("one", "two"):
            (folder / name).write_text(text)


def content(path: Path) -> list[str]:
    return [(path / name).read_text() for name in ("one", "two")]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    with new_folder(path) as folder:
        (folder / "one").write_text("old")
        (folder / "one").chmod(0o600)
        assert not path.exists()
    (tmp_path / "plain").touch()
    assert (path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(KeyboardInterrupt), new_folder(path) as folder:
        raise KeyboardInterrupt
    assert (path / "one").read_text() == "old"
    write(path, "new")
    assert content(path) == ["new", "new"]
    assert os.listdir(path.parent) == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    path, found = tmp_path / "model", set()
    for moment in range(1, 200):
        write(path, "old")
        child = os.fork()
        if child == 0:
            seen = 0

            def kill(event: str, _: object, moment: int = moment) -> None:
                nonlocal seen
                seen += event.partition(".")[0] in ("open", "os", "shutil", "ctypes", "tempfile", "fcntl")
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            write(path, "new")
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        # Between two renames the old folder lies aside, whole.
        there = path if path.exists() or exchange else next(tmp_path.glob(".model.*.old"))
        found.add(content(there)[0])
        assert content(there) in (["old"] * 2, ["new"] * 2)
        if finished:
            break
        write(path, "old")
        assert not list(tmp_path.glob("*partial"))  # what the killed one left
    assert finished
    assert moment > 20
    assert found == {"old", "new"}


def test_full_disks_are_named(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(NoSpaceError, match="model: the disk is full") as caught, new_folder(tmp_path / "model"):
            raise error
        assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)
    with pytest.raises(NoSpaceError, match=r"cache: expected .* GB free at .*, got"):
        check_space(tmp_path / "cache", 10**18, "cache")


def test_two_writers_and_links(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as first:
        (first / "one").write_text("first")
        write(tmp_path / "model", "second")
    assert os.listdir(tmp_path / "model") == ["one"]
    with (
        pytest.raises(FileExistsError, match="another process made it in the meantime"),
        new_folder(tmp_path / "new", replace=False),
    ):
        write(tmp_path / "new", "other")
    assert content(tmp_path / "new") == ["other", "other"]
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(FileExistsError, match="link: expected a folder to replace, got a link"):
        write(tmp_path / "link", "new")
