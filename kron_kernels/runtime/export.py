"""Export of a model folder to a package, checked against eager torch before it takes its place."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .package import FORMATS, INFO_FILE, Package, PackageInfo, load_package

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportReport:
    """What was exported and what it came to. Sizes in bytes, those of models without configuration and tokenizer.

    ``errors`` holds each output's largest ``||y - y_torch|| / ||y_torch||`` over the inputs it was checked on;
    ``nodes`` counts the nodes of the graph by kind: all of them for ONNX, else those that call an op of kron_kernels.
    """

    source: str
    target: str
    format: str
    dtype: str
    architecture: str
    outputs: tuple[str, ...]
    package_bytes: int
    model_bytes: int
    dense_bytes: int | None
    errors: dict[str, float]
    tolerance: float
    nodes: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"version": 1, "kron_kernels": __version__, **dataclasses.asdict(self)}


def export_model(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    dtype: str = "fp32",
    dense_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model as a package that ``load_package`` runs, batch and sequence free.

    Args:
        model_dir: folder of a KronBert model, what ``compress`` writes, or of a dense BERT; any head.
        out: file to make, ending in ``.pt2``, or ``.onnx`` for ONNX. It appears whole and checked, or not at all.
        format: "aoti" (compiled by AOTInductor, needs a C++ compiler), "export" (a program saved by torch.export) or
            "onnx" (each Kronecker layer a reshape and two MatMuls).
        dtype: of weights and arithmetic, "fp32" or "bf16"; ONNX takes fp32 alone, since onnxruntime lacks bf16 on CPUs.
        dense_dir: folder of the dense model, whose size is reported too.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is False, or is a folder.
        OSError: a missing, damaged or incomplete model.
        ValueError: an unknown format or dtype, a suffix that does not go with the format, another architecture.
        RuntimeError: outputs that do not agree with eager torch, a missing compiler or optional package.
    """
    from ..testing.encoder import TOLERANCE
    from .program import Served, capture, load_model

    start = time.perf_counter()
    target = Path(out)
    _check_request(target, format, dtype, overwrite)
    model_bytes = weight_bytes(model_dir)
    dense_bytes = None if dense_dir is None else weight_bytes(dense_dir, "dense")
    served = Served(load_model(model_dir, DTYPES[dtype])).eval()
    program = capture(served)
    config = served.model.config
    info = PackageInfo(
        format=format,
        architecture=type(served.model).__name__,
        dtype=dtype,
        outputs=_output_names(program),
        max_sequence=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        types=config.type_vocab_size,
        torch=torch.__version__,
        kron_kernels=__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
    )
    tolerance = TOLERANCE[DTYPES[dtype]]
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial = folder / target.name
        nodes = write_package(program, info, partial)
        errors = check_package(load_package(partial), served)
        # Not "greater": an error that is no number must fail too.
        if wrong := {name: error for name, error in errors.items() if not error <= tolerance}:
            listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
            raise RuntimeError(f"the package does not agree with eager torch: {listed}, allowed {tolerance:.0e}")
        package_bytes = partial.stat().st_size
        os.replace(partial, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ExportReport(
        source=str(model_dir),
        target=str(target),
        format=format,
        dtype=dtype,
        architecture=info.architecture,
        outputs=info.outputs,
        package_bytes=package_bytes,
        model_bytes=model_bytes,
        dense_bytes=dense_bytes,
        errors=errors,
        tolerance=tolerance,
        nodes=nodes,
        seconds=time.perf_counter() - start,
    )


def check_package(package: Package, served: Any) -> dict[str, float]:
    """Each output's largest relative error against the eager model, over a padded batch, one token, the longest input.

    The inputs differ in shape from those that the program was captured with. What stands at padding positions is not
    compared: models may leave them out.
    """
    from .program import example_inputs

    longest = package.info.max_sequence
    errors = dict.fromkeys(package.info.outputs, 0.0)
    for seed, shape in enumerate(((4, min(5, longest)), (1, 1), (2, longest)), start=1):
        inputs = example_inputs(served.model.config, *shape, seed=seed)
        with torch.inference_mode():
            wanted = served(**inputs)
        real = inputs["attention_mask"].bool()
        for name, got in package(**inputs).items():
            want = wanted[name]
            if got.shape != want.shape:
                raise RuntimeError(
                    f"{name}: expected the shape {tuple(want.shape)}, the package gives {tuple(got.shape)}"
                )
            if want.shape[:2] == real.shape:
                got, want = got[real], want[real]
            error = (got.double() - want).norm() / want.double().norm().clamp(min=torch.finfo(torch.float32).tiny)
            # max() of Python would lose a NaN.
            errors[name] = float(torch.maximum(torch.tensor(errors[name]), error))
    return errors


def weight_bytes(folder: str | os.PathLike[str], what: str = "model") -> int:
    """Bytes of the weight files in a model folder; FileNotFoundError where there are none."""
    path = Path(folder)
    files = list(path.glob("*.safetensors")) or list(path.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{what}: expected a model folder, with config.json and weights, got {path}")
    return sum(file.stat().st_size for file in files)


def _check_request(target: Path, format: str, dtype: str, overwrite: bool) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    if format == "onnx" and dtype != "fp32":
        raise ValueError(f"dtype: expected 'fp32' for the format onnx, whose runtime lacks {dtype} on CPUs")
    if target.suffix != FORMATS[format]:
        raise ValueError(f"out: expected a name ending in {FORMATS[format]} for the format {format}, got {target}")
    if target.is_dir():
        raise FileExistsError(f"out: expected a file, got the folder {target}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"out: {target} exists; remove it, or ask to overwrite it")


def _output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The keys of the dict that the program returns."""
    names = program.call_spec.out_spec.context
    return tuple(names)


def write_package(program: torch.export.ExportedProgram, info: PackageInfo, path: Path) -> dict[str, int]:
    """Write a captured program in the format that ``info`` names; returns ``nodes`` of the report."""
    if info.format == "onnx":
        from .onnx_form import write_onnx

        return write_onnx(program, info, path)
    if info.format == "aoti":
        from torch._inductor import aoti_compile_and_package

        from .program import fill_lists

        fill_lists(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of deprecations inside torch
            aoti_compile_and_package(program, package_path=str(path))
        with zipfile.ZipFile(path, "a") as archive:
            # Files of a .pt2 archive stand in a folder of the archive's own name.
            archive.writestr(f"{path.stem}/{INFO_FILE}", info.to_json())
    else:
        torch.export.save(program, path, extra_files={Path(INFO_FILE).name: info.to_json()})
    calls = Counter(
        str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("kron_kernels.")
    )
    return dict(calls.most_common())
