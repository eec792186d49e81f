"""Load and run packages: one class for every format, which checks what goes in."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The ops must be registered before a program that calls them is loaded.
from .. import backends  # noqa: F401

# Suffix of a file -> its format.
FORMATS: Mapping[str, str] = {".pt2": "export", ".onnx": "onnx"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Where a package keeps its PackageInfo: a file of a .pt2 archive, a metadata property of an ONNX model.
INFO_FILE = "extra/kron_kernels.json"
INFO_KEY = "kron_kernels"
# The property of an ONNX model with the sha256 of the whole file, computed with zeros in the place of the digits.
HASH_KEY = "kron_kernels_sha256"
HASH_PLACEHOLDER = "0" * 64
_HASH_IN_FILE = re.compile(re.escape(HASH_KEY.encode()) + rb"\x12\x40([0-9a-f]{64})")
# What torch.export.save writes for a program of plain tensors: nothing here is a pickle or machine code.
_ARCHIVE_FILES = re.compile(
    r"models/model\.json|data/(weights|constants)/(model_\w+_config\.json|(weight|tensor)_\d+)|extra/kron_kernels\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)

Run = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class PackageInfo:
    """What a package holds. The export writes it into the package, ``load_package`` reads it.

    ``max_sequence``, ``vocabulary`` and ``types`` bound the inputs; ``torch`` and ``kron_kernels`` are the versions
    that made the package.
    """

    format: str
    architecture: str
    dtype: str
    outputs: tuple[str, ...]
    max_sequence: int
    vocabulary: int
    types: int
    torch: str
    kron_kernels: str
    version: int = 2

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PackageInfo:
        """Read what ``to_json`` wrote; ValueError for anything else, other versions included."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("version") != cls.version:
            raise ValueError(f"expected package information of version {cls.version}, got {text[:80]!r}")
        try:
            return cls(**{**fields, "outputs": tuple(fields["outputs"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"package information: {error}") from error


class Package:
    """A loaded model. ``info`` says what it holds; a call runs it."""

    def __init__(self, info: PackageInfo, run: Run) -> None:
        self.info = info
        self._run = run

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the outputs of the model, by name.

        Args:
            inputs: ``input_ids``, ``attention_mask`` (default: all ones) and ``token_type_ids`` (default: zeros), each
                int64 ``(batch, sequence)`` on the CPU. Batch and sequence are free from 1 on, the latter up to
                ``info.max_sequence``.

        Returns:
            Tensors by the names in ``info.outputs``, those that the model of transformers gives them.

        Raises:
            ValueError: other names or shapes.
            TypeError: other dtypes.
            IndexError: ids outside their table.
        """
        with torch.inference_mode():
            outputs = self._run(self._checked(inputs))
        return {name: outputs[name] for name in self.info.outputs}

    def _checked(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "input_ids" not in inputs or not set(inputs) <= set(INPUTS):
            raise ValueError(
                "inputs: expected input_ids and optionally attention_mask and token_type_ids, got "
                f"{', '.join(inputs) or 'none'}"
            )
        ids = inputs["input_ids"]
        for name in (name for name in INPUTS if name in inputs):
            tensor = inputs[name]
            if not isinstance(tensor, Tensor) or tensor.dtype is not torch.int64 or not tensor.is_cpu:
                got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: expected a tensor of torch.int64 on the cpu, got {got}")
            if tensor.shape != ids.shape:
                raise ValueError(
                    f"{name}: expected the shape of input_ids, {tuple(ids.shape)}, got {tuple(tensor.shape)}"
                )
        if ids.dim() != 2 or 0 in ids.shape or ids.shape[1] > self.info.max_sequence:
            raise ValueError(
                f"input_ids: expected shape (batch, sequence) with at least one row and 1 to {self.info.max_sequence} "
                f"columns, got {tuple(ids.shape)}"
            )
        _check_range("input_ids", ids, self.info.vocabulary)
        if "token_type_ids" in inputs:
            _check_range("token_type_ids", inputs["token_type_ids"], self.info.types)
        defaults = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        return {name: inputs[name] if name in inputs else defaults[name](ids) for name in INPUTS}


def load_package(path: str | os.PathLike[str]) -> Package:
    """Load what ``export_model`` wrote, or the folder of a model, to run on the CPU.

    A folder holds a KronBert, as ``kron-kernels compress`` writes it, or a dense BERT, with any head. A KronBert runs
    in its inference form (``optimize_for_inference``).

    A ``.pt2`` file is a program: loading and calling it executes code that is in the file. Load only files whose origin
    you trust. Archives with pickles or machine code in them, which torch would execute too, are errors here.

    Raises:
        FileNotFoundError: no such file or folder.
        OSError: a file that is damaged, truncated or not such a package; a checkpoint that lacks weights of its
            configuration, or has others.
        ValueError: a suffix other than ``.pt2`` and ``.onnx``; a folder of another kind of model.
        RuntimeError: an optional package that is missing.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"package: expected a file or a model folder, got {path}")
    if path.suffix == ".pt2":
        return _load_archive(path)
    if path.suffix == ".onnx":
        return _load_onnx(path)
    raise ValueError(f"package: expected a file ending in .pt2 or .onnx, got {path}")


def _load_folder(path: Path) -> Package:
    from ..models import optimize_for_inference
    from .program import NamedOutputs, is_kron, load_model, model_info

    loaded = load_model(path)
    model = NamedOutputs(optimize_for_inference(loaded) if is_kron(loaded) else loaded).eval()
    return Package(model_info(model, "folder"), lambda inputs: model(**inputs))


def _load_archive(path: Path) -> Package:
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            # Files of the archive stand in a folder of its own name.
            files = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            text = archive.read(files[INFO_FILE]).decode() if INFO_FILE in files else None
            info = _read_info(path, text, "export")
            for name, entry in files.items():
                if entry.file_size and not _ARCHIVE_FILES.fullmatch(name):
                    raise OSError(f"{path}: expected a program and plain tensors, got {name}, which is not loaded")
                if name.endswith("_config.json"):
                    stored = json.loads(archive.read(entry))["config"]
                    if pickled := [key for key, payload in stored.items() if payload["use_pickle"]]:
                        raise OSError(f"{path}: expected plain tensors, got the pickle of {pickled[0]}; not loaded")
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError),
        *(ValueError, KeyError, TypeError, AttributeError),  # of JSON, and of what stands in it
    ) as error:
        raise OSError(f"{path}: damaged or truncated package: {error}") from error
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # torch raises what it meets: KeyError, RuntimeError, AssertionError and others
        raise OSError(
            f"{path}: torch {torch.__version__} cannot load this package, made by torch {info.torch} and kron_kernels "
            f"{info.kron_kernels}: {_first_line(error)}"
        ) from error
    return Package(info, lambda inputs: module(**inputs))


def _load_onnx(path: Path) -> Package:
    onnxruntime = require("onnxruntime", "an ONNX package")
    hashes = _onnx_hashes(path.read_bytes())
    if hashes and hashes.written != hashes.computed:
        raise OSError(f"{path}: damaged package: expected the sha256 {hashes.written}, got {hashes.computed}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise OSError(f"{path}: damaged or truncated package: {_first_line(error)}") from error
    info = _read_info(path, session.get_modelmeta().custom_metadata_map.get(INFO_KEY), "onnx")
    if hashes is None:
        raise OSError(f"{path}: damaged package: expected the sha256 of the file in its metadata, got none")

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(info.outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(info.outputs, values, strict=True)}

    return Package(info, run)


class _Hashes(NamedTuple):
    written: str
    computed: str
    offset: int  # of the written digits


def _onnx_hashes(content: bytes) -> _Hashes | None:
    """The sha256 that an ONNX file was written with and the one it has now; None where it names none."""
    found = _HASH_IN_FILE.search(content)
    if found is None:
        return None
    view, digest = memoryview(content), hashlib.sha256()
    for part in (view[: found.start(1)], HASH_PLACEHOLDER.encode(), view[found.end(1) :]):
        digest.update(part)
    return _Hashes(found[1].decode(), digest.hexdigest(), found.start(1))


def write_onnx_hash(path: Path) -> None:
    """Replace the placeholder in an ONNX file, under ``HASH_KEY`` in its metadata, by the file's sha256."""
    hashes = _onnx_hashes(path.read_bytes())
    assert hashes is not None
    with path.open("r+b") as file:
        file.seek(hashes.offset)
        file.write(hashes.computed.encode())


def require(name: str, what: str) -> Any:
    """Import an optional package; RuntimeError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{what} needs {name}: pip install 'kron_kernels[serving]' ({error})") from error


def _read_info(path: Path, text: str | None, format: str) -> PackageInfo:
    if text is None:
        raise OSError(f"{path}: expected a package made by kron-kernels export, got another file of its kind")
    try:
        info = PackageInfo.from_json(text)
    except ValueError as error:
        raise OSError(f"{path}: {error}") from error
    if info.format != format:
        raise OSError(f"{path}: expected the format {format}, got {info.format!r}")
    return info


def _check_range(name: str, ids: Tensor, size: int) -> None:
    least, most = (int(value) for value in torch.aminmax(ids))
    if least < 0 or most >= size:
        raise IndexError(f"{name}: expected ids from 0 to {size - 1}, got {least if least < 0 else most}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
