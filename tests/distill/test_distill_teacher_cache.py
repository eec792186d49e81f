"""The teacher's outputs on disk: what comes back, what is refused, and kills and full disks on the way."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from kron_kernels.distill import teacher_cache
from kron_kernels.distill.teacher_cache import TeacherCache, fingerprint, predict_bytes

LENGTHS = [3, 5, 1, 4]
WIDTHS: dict[str, int | tuple[int, int]] = {"embedding": 6, "queries": (2, 4)}
EXAMPLE_WIDTHS = {"logits": 3}
Usage = namedtuple("Usage", "total used free")


def open_cache(path: Path, **changes: Any) -> TeacherCache:
    arguments: dict[str, Any] = {
        "fingerprint": "teacher 1",
        "lengths": LENGTHS,
        "widths": WIDTHS,
        "dtype": torch.float32,
        "example_widths": EXAMPLE_WIDTHS,
    }
    return TeacherCache.open(path, **{**arguments, **changes})


def outputs(indices: list[int], padded: int) -> dict[str, torch.Tensor]:
    """Values that tell example, layer, token and place apart, each a float16; noise as padding."""
    made = {
        "embedding": torch.arange(6).expand(len(indices), padded, 6) + 0.0,
        "queries": torch.arange(4).expand(len(indices), 2, padded, 4) + 0.0,
        "logits": torch.arange(3).expand(len(indices), 3) + 0.0,
    }
    tokens = torch.arange(padded, dtype=torch.float32)[:, None] * 8
    made["embedding"] = made["embedding"] + tokens
    made["queries"] = made["queries"] + tokens + 0.5 * torch.arange(2)[:, None, None]
    made = {name: tensor.clone() for name, tensor in made.items()}
    for place, index in enumerate(indices):
        for name in made:
            made[name][place] += 64 * index
        made["embedding"][place, LENGTHS[index] :] = 999
        made["queries"][place, :, LENGTHS[index] :] = 999
    return made


def check(cache: TeacherCache, indices: list[int], padded: int) -> None:
    """Whether the cache gives the outputs, with zeros as padding."""
    got, wanted = cache.get(indices, padded), outputs(indices, padded)
    assert got is not None
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor.masked_fill(tensor == 999, 0).to(cache.dtype), rtol=0, atol=0)


def put(cache: TeacherCache, indices: list[int], padded: int = 7) -> None:
    cache.put(indices, [LENGTHS[index] for index in indices], outputs(indices, padded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_put_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    with open_cache(tmp_path / "deep" / "cache", dtype=dtype) as cache:
        put(cache, [2, 0])
        put(cache, [1], padded=5)
        check(cache, [0, 1, 2], 5)
    with open_cache(tmp_path / "deep" / "cache", dtype=dtype) as again:
        assert again.filled == 3
        check(again, [1, 2, 1, 0], 9)
        assert again.get([0, 3], 5) is None
        put(again, [0, 3])
        check(again, [3], 4)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["cache"]


def test_casts_are_those_of_torch_and_what_is_there_stays(tmp_path: Path) -> None:
    with open_cache(tmp_path / "cache", dtype=torch.bfloat16) as cache:
        values = {name: torch.randn_like(tensor) for name, tensor in outputs([1], 5).items()}
        cache.put(torch.tensor([1]), torch.tensor([5]), values)
        other = {name: torch.zeros_like(tensor) for name, tensor in outputs([1, 0], 5).items()}
        cache.put([1, 0], [5, 3], other)
        got = cache.get([1], 5)
        assert got is not None
        for name, tensor in values.items():
            torch.testing.assert_close(got[name], tensor.bfloat16(), rtol=0, atol=0)


def test_many_layers_go_past_the_limit_of_one_call(tmp_path: Path) -> None:
    widths = {"ffn": (2500, 2)}
    values = torch.randn(2, 2500, 3, 2)
    with TeacherCache.open(tmp_path / "cache", "teacher", [2, 3], widths, torch.float32) as cache:
        cache.put([0, 1], [2, 3], {"ffn": values})
        got = cache.get([0, 1], 3)
    assert got is not None
    values[0, :, 2] = 0
    torch.testing.assert_close(got["ffn"], values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "teacher 2"}, "fingerprint: expected teacher 2, got teacher 1"),
        ({"lengths": [3, 5, 4, 1]}, "lengths: expected 4 examples, [0-9a-f]+, got 4 examples, [0-9a-f]+"),
        ({"dtype": torch.float16}, "dtype: expected float16, got float32"),
        ({"widths": {"embedding": 6}}, r"outputs: expected .*, got .*queries"),
        ({"example_widths": {"logits": 2}}, r"outputs: expected .*'logits': \[None, 2, False\].*, got "),
    ],
)
def test_another_cache_is_an_error_or_built_anew(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with open_cache(tmp_path / "cache") as cache:
        put(cache, [0])
    with pytest.raises(ValueError, match=f"cache: .*cache is not what was asked for: {message}.*; rebuild it, or"):
        open_cache(tmp_path / "cache", **change)
    with open_cache(tmp_path / "cache") as cache:
        assert cache.filled == 1
    with open_cache(tmp_path / "cache", rebuild=True) as cache:
        assert cache.filled == 1, "it is as asked for"
    with open_cache(tmp_path / "cache", **change, rebuild=True) as cache:
        assert cache.filled == 0


def test_damaged_caches_are_found_as_they_are_opened(tmp_path: Path) -> None:
    open_cache(tmp_path / "cache").close()
    path = tmp_path / "cache" / "queries.bin"
    size = path.stat().st_size
    os.truncate(path, size - 4)
    with pytest.raises(ValueError, match=rf"queries\.bin: expected {size} bytes, got {size - 4}"):
        open_cache(tmp_path / "cache")
    path.unlink()
    with pytest.raises(ValueError, match=rf"queries\.bin: expected {size} bytes, got 0"):
        open_cache(tmp_path / "cache")
    for text in ("{", "[]"):
        (tmp_path / "cache" / "teacher_cache.json").write_text(text)
        with pytest.raises(ValueError, match=r"teacher_cache\.json is damaged"):
            open_cache(tmp_path / "cache")
    open_cache(tmp_path / "cache", rebuild=True).close()
    cache = open_cache(tmp_path / "cache")
    put(cache, [3])
    os.truncate(path, 8)
    with pytest.raises(OSError, match="damaged teacher cache, cut short"):
        cache.get([3], 4)


def test_what_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("mine")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        for rebuild in (False, True):
            with pytest.raises(FileExistsError, match=r"cache: expected a new folder or a cache's, got .*other things"):
                open_cache(path, rebuild=rebuild)
    assert (tmp_path / "pytorch_model.bin").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    open_cache(tmp_path / "empty").close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "dtype: expected one of float16, bfloat16, float32, got float64"),
        ({"lengths": [3, 0]}, "lengths: expected a positive number for each of one or more examples"),
        ({"lengths": []}, "lengths: expected a positive number for each of one or more examples"),
        ({"widths": {}, "example_widths": {}}, "widths: expected one or more outputs"),
        ({"widths": {"logits": 3}}, "none of them in example_widths too"),
        ({"widths": {"../x": 3}}, r"widths: expected names of letters, digits and underscores, got '\.\./x'"),
        ({"widths": {"ffn": (0, 3)}}, r"widths: expected positive numbers for ffn, got \(0, 3\)"),
    ],
)
def test_bad_arguments_of_open(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_cache(tmp_path / "cache", **change)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_of_get_and_put(tmp_path: Path) -> None:
    with open_cache(tmp_path / "cache", dtype=torch.float16) as cache:
        for bad in (-1, 4):
            with pytest.raises(IndexError, match=f"indices: expected examples from 0 to 3, got {bad}"):
                cache.get([0, bad], 5)
        with pytest.raises(ValueError, match="padded_length: expected at least the longest example's 5, got 4"):
            cache.get([0, 1], 4)
        made = outputs([0, 1], 5)
        with pytest.raises(ValueError, match=r"lengths: expected \[3, 5\], got \[3, 4\]"):
            cache.put([0, 1], [3, 4], made)
        with pytest.raises(
            ValueError, match=r"tensors: expected \['embedding', 'logits', 'queries'\], got \['logits'\]"
        ):
            cache.put([0, 1], [3, 5], {"logits": made["logits"]})
        for name, shape, wanted in (
            ("embedding", (2, 4, 6), "2, at least 5, 6"),
            ("embedding", (6,), "2, at least 5, 6"),
            ("queries", (2, 3, 5, 4), "2, 2, at least 5, 4"),
            ("logits", (2, 2), "2, 3"),
        ):
            with pytest.raises(ValueError) as error:
                cache.put([0, 1], [3, 5], {**made, name: torch.zeros(shape)})
            assert str(error.value) == f"{name}: expected shape ({wanted}), got {shape}"
        with pytest.raises(ValueError, match="logits: expected values that float16 holds, at most 65504"):
            cache.put([0, 1], [3, 5], {**made, "logits": made["logits"] + 1e5})
        assert cache.filled == 0


def test_data_without_a_flag_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path / "cache")
    put(cache, [0])
    cache.flush()
    order = []
    fsync, pwrite = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "pwrite", lambda *arguments: (order.append("flag"), pwrite(*arguments))[1])
    put(cache, [1])
    assert order == []
    cache.flush()
    # Three files of data, one flag, its file.
    assert order == ["sync", "sync", "sync", "flag", "sync"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", killed)
    put(cache, [2])
    with pytest.raises(KeyboardInterrupt):
        cache.flush()
    monkeypatch.setattr(os, "pwrite", pwrite)
    reopened = open_cache(tmp_path / "cache")
    assert reopened.filled == 2
    assert reopened.get([2], 5) is None
    check(reopened, [0, 1], 5)


def test_flags_are_written_once_enough_has_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = predict_bytes([3], WIDTHS, torch.float32, EXAMPLE_WIDTHS)
    assert one == 4 * (3 * (6 + 8) + 3)
    monkeypatch.setattr(teacher_cache, "SYNC_BYTES", one + 1)
    cache = open_cache(tmp_path / "cache")
    put(cache, [0])
    assert (tmp_path / "cache" / "filled").read_bytes() == bytes([0, 0, 0, 0])
    put(cache, [2])
    assert (tmp_path / "cache" / "filled").read_bytes() == bytes([1, 0, 1, 0])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = predict_bytes(LENGTHS, WIDTHS, torch.float32, EXAMPLE_WIDTHS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, size - 1))
    with pytest.raises(OSError, match=r"teacher cache: expected 0\.00 MB free at .*, got 0\.00 MB"):
        open_cache(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, size))
    cache = open_cache(tmp_path / "cache")
    pwritev = os.pwritev
    # A write that the disk takes in part.
    monkeypatch.setattr(os, "pwritev", lambda *arguments: pwritev(*arguments) - 1)
    with pytest.raises(OSError, match=r"embedding\.bin: the disk is full"):
        put(cache, [0])
    monkeypatch.setattr(os, "pwritev", pwritev)
    assert cache.get([0], 5) is None
    put(cache, [0, 1, 2])
    cache.close()
    # What is there already need not be free once more.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 0))
    check(open_cache(tmp_path / "cache"), [0, 1, 2], 5)


def test_killed_processes_leave_whole_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at some points of filling: every flagged example is whole, and the rest can be filled."""
    count, widths = 1000, {"ffn": (3, 50)}
    lengths = [1 + index % 7 for index in range(count)]
    monkeypatch.setattr(teacher_cache, "SYNC_BYTES", 10_000)
    pwritev = os.pwritev
    # Most of the time passes between the writes of a batch.
    monkeypatch.setattr(os, "pwritev", lambda *arguments: (time.sleep(1e-3), pwritev(*arguments))[1])

    def open_large() -> TeacherCache:
        return TeacherCache.open(tmp_path / "cache", "teacher", lengths, widths, torch.float32)

    def fill() -> None:
        cache = open_large()
        for start in range(0, count, 4):
            rows = list(range(start, start + 4))
            if cache.get(rows, 7) is None:
                values = torch.tensor(rows, dtype=torch.float32)[:, None, None, None].expand(4, 3, 7, 50)
                cache.put(rows, [lengths[row] for row in rows], {"ffn": values})

    filled = [0]
    for delay in (0.03, 0.041, 0.053, 0.067):
        process = os.fork()
        if process == 0:
            try:
                fill()
            finally:
                os._exit(1)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "it ended by itself"
        cache = open_large()
        filled.append(cache.filled)
        for row in range(count):
            got = cache.get([row], lengths[row])
            if got is not None:
                assert bool((got["ffn"] == row).all()), row
        cache.close()
    assert filled == sorted(filled)
    assert filled[-1] > 0


def test_fingerprints_tell_teachers_and_data_apart() -> None:
    teacher = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    first = fingerprint(teacher, [[1, 2], [3]])
    assert fingerprint(teacher, iter([(1, 2), (3,)])) == first
    others = {
        fingerprint(teacher, [[1], [2, 3]]),
        fingerprint(teacher, [[3], [1, 2]]),
        fingerprint(teacher, [[1, 2], [3]], extra="bfloat16"),
        fingerprint(torch.nn.Sequential(*teacher, torch.nn.ReLU()), [[1, 2], [3]]),
    }
    with torch.no_grad():
        teacher[0].weight[1, 2] += 0.125
    others.add(fingerprint(teacher, [[1, 2], [3]]))
    assert len(others | {first}) == 6
