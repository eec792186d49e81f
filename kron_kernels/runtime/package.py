"""Packages read and run: one class for the three formats, which checks what goes in."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The ops must be registered before a program that calls them is loaded.
from .. import backends  # noqa: F401

# Format -> suffix of its files.
FORMATS: Mapping[str, str] = {"aoti": ".pt2", "export": ".pt2", "onnx": ".onnx"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Where a package keeps its PackageInfo: a file of a .pt2 archive, a metadata property of an ONNX model.
INFO_FILE = "extra/kron_kernels.json"
INFO_KEY = "kron_kernels"
# What torch calls the instruction sets it was started with, from the least on.
_CPU_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")

Run = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class PackageInfo:
    """What a package holds: written into it by the export, read by ``load_package``.

    ``max_sequence``, ``vocabulary`` and ``types`` bound the inputs; ``cpu`` is the instruction set of the machine that
    compiled it, in the words of ``torch.backends.cpu.get_cpu_capability``.
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
    cpu: str
    version: int = 1

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PackageInfo:
        """Raises ValueError for anything but what ``to_json`` of this version wrote."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("version") != 1:
            raise ValueError(f"expected package information of version 1, got {text[:80]!r}")
        try:
            return cls(**{**fields, "outputs": tuple(fields["outputs"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"package information: {error}") from error


class Package:
    """A loaded package. ``info`` says what it holds; a call runs it."""

    def __init__(self, info: PackageInfo, run: Run) -> None:
        self.info = info
        self._run = run

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of the model, by name.

        Args:
            inputs: ``input_ids``, ``attention_mask`` (default: all ones) and ``token_type_ids`` (default: zeros), each
                int64 ``(batch, sequence)`` on the CPU. Batch and sequence are free from 1 on, the latter up to
                ``info.max_sequence``.

        Returns:
            Tensors by the names in ``info.outputs``, those that the model of transformers gives them.

        Raises:
            ValueError: other names or shapes. TypeError: other dtypes. IndexError: ids outside their table.
        """
        with torch.inference_mode():
            outputs = self._run(self._checked(inputs))
        return {name: outputs[name] for name in self.info.outputs}

    def _checked(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "input_ids" not in inputs or not set(inputs) <= set(INPUTS):
            raise ValueError(
                "inputs: expected input_ids and, where wanted, attention_mask and token_type_ids, got "
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
        # Compiled code reads its inputs by the strides it was made for.
        return {name: (inputs[name] if name in inputs else defaults[name](ids)).contiguous() for name in INPUTS}


def load_package(path: str | os.PathLike[str]) -> Package:
    """Load what ``export_model`` or ``kron-kernels export`` wrote, of any format, to run on the CPU.

    The folder of a KronBertModel, as ``kron-kernels compress`` writes it, runs as it is: through the ops, without an
    export. It must have every layer factored, in floating point.

    An AOTInductor package is machine code: load only files whose origin you trust.

    Raises:
        FileNotFoundError: no such file or folder.
        OSError: a file that is damaged, truncated or not such a package.
        ValueError: a suffix other than ``.pt2`` and ``.onnx``; a folder of another model.
        RuntimeError: a package compiled for another torch or a processor with more instructions than this one; an
            optional package that is missing.
    """
    path = Path(path)
    if path.is_dir():
        from .folder import load_folder

        return load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"package: expected a file or a model folder, got {path}")
    if path.suffix == ".pt2":
        return _load_archive(path)
    if path.suffix == ".onnx":
        return _load_onnx(path)
    raise ValueError(f"package: expected a file ending in .pt2 or .onnx, got {path}")


def _load_archive(path: Path) -> Package:
    try:
        with zipfile.ZipFile(path) as archive:
            # Machine code with a flipped bit would end the process: every file's checksum is looked at first.
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            names = [name for name in archive.namelist() if name.endswith(INFO_FILE)]
            text = archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, NotImplementedError) as error:
        raise OSError(f"{path}: damaged or truncated package: {error}") from error
    info = _read_info(path, text, ("aoti", "export"))
    if info.format == "aoti":
        _check_machine(path, info)
    try:
        return Package(info, _aoti_runner(path) if info.format == "aoti" else _export_runner(path))
    except Exception as error:  # torch raises what it meets: KeyError, RuntimeError, AssertionError and others
        raise OSError(
            f"{path}: torch {torch.__version__} cannot load this package, made by torch {info.torch} and kron_kernels "
            f"{info.kron_kernels}: {_first_line(error)}"
        ) from error


def _aoti_runner(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(path))
    return lambda inputs: model(**inputs)


def _export_runner(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def _load_onnx(path: Path) -> Package:
    onnxruntime = require("onnxruntime", "an ONNX package")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise OSError(f"{path}: damaged or truncated package: {_first_line(error)}") from error
    info = _read_info(path, session.get_modelmeta().custom_metadata_map.get(INFO_KEY), ("onnx",))

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(info.outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(info.outputs, values, strict=True)}

    return Package(info, run)


def _read_info(path: Path, text: str | None, formats: tuple[str, ...]) -> PackageInfo:
    if text is None:
        raise OSError(f"{path}: expected a package made by kron-kernels export, got another file of its kind")
    try:
        info = PackageInfo.from_json(text)
    except ValueError as error:
        raise OSError(f"{path}: {error}") from error
    if info.format not in formats:
        raise OSError(f"{path}: expected the format {' or '.join(formats)}, got {info.format!r}")
    return info


def _check_machine(path: Path, info: PackageInfo) -> None:
    """Refuse machine code that would not start, or would end the process."""
    here = torch.__version__
    if info.torch.split(".")[:2] != here.split(".")[:2]:
        raise RuntimeError(f"{path}: compiled for torch {info.torch}, this is torch {here}; export the model again")
    cpu = torch.backends.cpu.get_cpu_capability()
    if info.cpu != cpu and (
        info.cpu not in _CPU_CAPABILITIES
        or cpu not in _CPU_CAPABILITIES
        or _CPU_CAPABILITIES.index(info.cpu) > _CPU_CAPABILITIES.index(cpu)
    ):
        raise RuntimeError(
            f"{path}: compiled on a processor with {info.cpu}, this one has {cpu}; export the model here"
        )


def require(name: str, what: str) -> Any:
    """Import an optional package; RuntimeError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{what} needs {name}: pip install 'kron_kernels[serving]' ({error})") from error


def _check_range(name: str, ids: Tensor, size: int) -> None:
    least, most = (int(value) for value in torch.aminmax(ids))
    if least < 0 or most >= size:
        raise IndexError(f"{name}: expected ids from 0 to {size - 1}, got {least if least < 0 else most}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
