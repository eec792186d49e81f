"""A frozen teacher's outputs on disk, by example, so that later epochs need not run it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from ..compress.files import NoSpaceError, check_space, new_folder, write_text
from .cache_layout import Entry, layout, total_bytes

VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Rows written since the last wait for the disk; that many are computed anew after a power failure or a kill.
SYNC_BYTES = 256 << 20
_HEADER, _FILLED = "teacher_cache.json", "filled"
# readv and writev take no more buffers at once (IOV_MAX of Linux).
_BUFFERS = 1024


class TeacherCache:
    """Outputs of a teacher for each example of a data set, at the example's own length, filled as the teacher runs.

    An output is (length, width) an example, (layers, length, width) where it is of several layers, or one vector
    (width,). Each has a flat file in which the examples follow each other without padding. It is read and written by
    ``preadv`` and ``pwritev`` rather than mapped: a full disk is then an error and not a signal, and what is read does
    not count as memory of the process. Files are sparse: what was not filled takes no space.

    An example counts as filled only by a flag of one byte that is written after its data is on the disk, so a process
    that is killed leaves no example half written. The flags wait until ``SYNC_BYTES`` of data have gathered.

    Open it by :meth:`open`; use it as a context manager, or call :meth:`close`.
    """

    def __init__(self, path: Path, lengths: np.ndarray, entries: Sequence[Entry], dtype: torch.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self._lengths = lengths
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._entries = {entry.name: entry for entry in entries}
        self._files: dict[str, BinaryIO] = {
            name: open(path / f"{name}.bin", "r+b", buffering=0)  # noqa: SIM115
            for name in self._entries
        }
        self._flags: BinaryIO = open(path / _FILLED, "r+b", buffering=0)  # noqa: SIM115
        self._filled = np.frombuffer(self._flags.read(), dtype=np.uint8).astype(bool)
        self._unflagged: list[int] = []
        self._unsynced = 0

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        fingerprint: str,
        lengths: Sequence[int],
        widths: Mapping[str, int | tuple[int, int]],
        dtype: torch.dtype = torch.float16,
        *,
        example_widths: Mapping[str, int] | None = None,
        rebuild: bool = False,
    ) -> TeacherCache:
        """Open the cache in a folder, or make it.

        Args:
            path: folder; its parents are made.
            fingerprint: of the teacher's weights and the data (see :func:`fingerprint`).
            lengths: tokens of each example, padding left out.
            widths: output -> values a token, or (layers, values a token).
            dtype: float16, bfloat16 or float32, in which the values are stored.
            example_widths: output -> values an example, of outputs that are one vector, such as a classifier's logits.
            rebuild: delete a cache of another teacher, data, outputs or dtype and start anew, instead of an error.

        Raises:
            ValueError: the folder holds another cache (the message says what differs), or a bad argument.
            FileExistsError: the folder holds other things.
            OSError: the disk has no room for all of it (ENOSPC).
        """
        path = Path(path)
        entries = layout(widths, example_widths or {})
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {_dtype_name(dtype)}")
        table = np.asarray(lengths, dtype=np.int64)
        if table.ndim != 1 or not len(table) or table.min() < 1:
            raise ValueError("lengths: expected a positive number for each of one or more examples")
        header = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "lengths": f"{len(table)} examples, {hashlib.sha256(table.tobytes()).hexdigest()}",
            "dtype": _dtype_name(dtype),
            "outputs": {entry.name: [entry.layers, entry.width, entry.per_token] for entry in entries},
        }
        size = total_bytes(table, entries, dtype)
        if (path / _HEADER).is_file():
            sizes = {f"{entry.name}.bin": total_bytes(table, [entry], dtype) for entry in entries}
            differing = _differing(path / _HEADER, header) or _cut_short(path, {**sizes, _FILLED: len(table)})
            if not differing:
                present = sum(file.stat().st_blocks * 512 for file in path.glob("*.bin"))
                check_space(path, size - min(size, present), "teacher cache")
                return cls(path, table, entries, dtype)
            if not rebuild:
                raise ValueError(
                    f"cache: {path} is not what was asked for: {differing}; rebuild it, or choose another folder"
                )
            shutil.rmtree(path)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"cache: expected a new folder or a cache's, got {path}, which holds other things")
        check_space(path, size, "teacher cache")
        with new_folder(path) as folder:
            for entry in entries:
                with open(folder / f"{entry.name}.bin", "wb") as file:
                    file.truncate(total_bytes(table, [entry], dtype))
            with open(folder / _FILLED, "wb") as file:
                file.truncate(len(table))
            write_text(folder / _HEADER, json.dumps(header, indent=2) + "\n")
        return cls(path, table, entries, dtype)

    @property
    def filled(self) -> int:
        """Examples in the cache."""
        return int(self._filled.sum())

    def get(self, indices: Sequence[int] | Tensor, padded_length: int) -> dict[str, Tensor] | None:
        """The outputs of these examples, in the cache's dtype on the CPU, with zeros as padding.

        Returns:
            Output -> (batch, padded_length, width), (batch, layers, padded_length, width) where it is of several, or
            (batch, width) where an example has one vector; None where any of the examples is missing.

        Raises:
            IndexError: an example that there is none of.
            ValueError: ``padded_length`` is less than an example's.
        """
        rows = self._rows(indices)
        longest = max((int(self._lengths[row]) for row in rows), default=0)
        if padded_length < longest:
            raise ValueError(f"padded_length: expected at least the longest example's {longest}, got {padded_length}")
        if not all(self._filled[row] for row in rows):
            return None
        return {name: self._read(entry, rows, padded_length) for name, entry in self._entries.items()}

    def put(
        self, indices: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor, tensors: Mapping[str, Tensor]
    ) -> None:
        """Keep the outputs of these examples; those already there are left as they are.

        Args:
            indices: examples.
            lengths: tokens of each, the same as given to :meth:`open`.
            tensors: every output, padded, in the shapes of :meth:`get`, of any floating dtype and device.

        Raises:
            IndexError: an example that there is none of.
            ValueError: another length, output or shape than the cache's, or a value that float16 cannot hold.
            OSError: the disk is full (ENOSPC); the examples stay missing.
        """
        rows = self._rows(indices)
        given = [int(length) for length in lengths]
        if given != [int(self._lengths[row]) for row in rows]:
            raise ValueError(f"lengths: expected {[int(self._lengths[row]) for row in rows]}, got {given}")
        if tensors.keys() != self._entries.keys():
            raise ValueError(f"tensors: expected {sorted(self._entries)}, got {sorted(tensors)}")
        missing = [place for place, row in enumerate(rows) if not self._filled[row]]
        if not missing:
            return
        stored = {name: self._to_store(entry, tensors[name], given) for name, entry in self._entries.items()}
        for place in missing:
            for name, entry in self._entries.items():
                buffers = _buffers(entry, stored[name][place], given[place])
                self._unsynced += self._transfer(os.pwritev, entry, rows[place], buffers)
        self._filled[[rows[place] for place in missing]] = True
        self._unflagged += [rows[place] for place in missing]
        if self._unsynced >= SYNC_BYTES:
            self.flush()

    def flush(self) -> None:
        """Wait until what was put is on the disk, and flag it."""
        if not self._unflagged:
            return
        for file in self._files.values():
            os.fsync(file.fileno())
        for row in self._unflagged:
            os.pwrite(self._flags.fileno(), b"\x01", row)
        os.fsync(self._flags.fileno())
        self._unflagged, self._unsynced = [], 0

    def close(self) -> None:
        """Flush, and close the files."""
        if not self._flags.closed:
            self.flush()
            for file in (*self._files.values(), self._flags):
                file.close()

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _rows(self, indices: Sequence[int] | Tensor) -> list[int]:
        rows = [int(index) for index in indices]
        for row in rows:
            if not 0 <= row < len(self._lengths):
                raise IndexError(f"indices: expected examples from 0 to {len(self._lengths) - 1}, got {row}")
        return rows

    def _to_store(self, entry: Entry, tensor: Tensor, lengths: Sequence[int]) -> Tensor:
        """Checked, cast and on the CPU."""
        longest = max(lengths)
        padded = tensor.shape[-2] if entry.per_token and tensor.dim() > 1 else longest
        expected = entry.shape(len(lengths), padded)
        if tuple(tensor.shape) != expected or padded < longest:
            wanted = ", ".join(map(str, entry.shape(len(lengths), f"at least {longest}")))
            raise ValueError(f"{entry.name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
        stored = tensor.detach().to("cpu", self.dtype).contiguous()
        if self.dtype is torch.float16 and not bool(stored.isfinite().all()):
            raise ValueError(f"{entry.name}: expected values that float16 holds, at most 65504; store bfloat16 instead")
        return stored

    def _read(self, entry: Entry, rows: Sequence[int], padded_length: int) -> Tensor:
        out = torch.zeros(entry.shape(len(rows), padded_length), dtype=self.dtype)
        for place, row in enumerate(rows):
            self._transfer(os.preadv, entry, row, _buffers(entry, out[place], int(self._lengths[row])))
        return out

    def _transfer(self, operation: Any, entry: Entry, row: int, buffers: Sequence[memoryview]) -> int:
        """Read or write an example's block from or to the buffers; its bytes."""
        start = (int(self._starts[row]) if entry.per_token else row) * entry.elements
        offset = start * self.dtype.itemsize
        descriptor, done = self._files[entry.name].fileno(), 0
        for first in range(0, len(buffers), _BUFFERS):
            group = buffers[first : first + _BUFFERS]
            count = operation(descriptor, group, offset + done)
            if count < sum(buffer.nbytes for buffer in group):
                what = f"{self.path / entry.name}.bin"
                if operation is os.pwritev:
                    raise NoSpaceError(f"{what}: the disk is full")
                raise OSError(errno.EIO, "damaged teacher cache, cut short", what)
            done += count
        return done


def fingerprint(teacher: nn.Module, examples: Iterable[Sequence[int]], extra: str = "") -> str:
    """A hash of a teacher's modules and weights and of the examples of a data set, for :meth:`TeacherCache.open`.

    Args:
        teacher: frozen model; its name on disk does not matter.
        examples: all that the model is given of each example, in order and without padding: its token ids, followed by
            its token types where there are several.
        extra: whatever else the outputs depend on, such as the precision in which the teacher runs.
    """
    digest = hashlib.sha256(f"{teacher!r}\n{extra}".encode())
    for name, tensor in teacher.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for ids in examples:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()


def predict_bytes(
    lengths: Sequence[int],
    widths: Mapping[str, int | tuple[int, int]],
    dtype: torch.dtype = torch.float16,
    example_widths: Mapping[str, int] | None = None,
) -> int:
    """Bytes of a full cache; arguments as :meth:`TeacherCache.open`."""
    return total_bytes(np.asarray(lengths, dtype=np.int64), layout(widths, example_widths or {}), dtype)


def _buffers(entry: Entry, example: Tensor, length: int) -> list[memoryview]:
    """The parts of a padded example, (layers, padded, width), (padded, width) or (width,), that are no padding."""
    # numpy knows no bfloat16.
    array = example.view(torch.uint8).numpy()
    if not entry.per_token:
        return [array.data.cast("B")]
    return [layer[:length].data.cast("B") for layer in (array if entry.layers is not None else [array])]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _differing(path: Path, wanted: Mapping[str, Any]) -> str:
    """What the header at ``path`` has otherwise, "" where nothing."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        header = None
    if not isinstance(header, dict):
        return f"{path.name} is damaged"
    parts = [
        f"{name}: expected {value}, got {header.get(name)}"
        for name, value in wanted.items()
        if header.get(name) != value
    ]
    return "; ".join(parts)


def _cut_short(path: Path, sizes: Mapping[str, int]) -> str:
    """Which file of ``sizes``, in bytes by name, has another size, "" where none."""
    found = {name: (path / name).stat().st_size if (path / name).exists() else 0 for name in sizes}
    parts = [f"{name}: expected {size} bytes, got {found[name]}" for name, size in sizes.items() if found[name] != size]
    return "; ".join(parts)
