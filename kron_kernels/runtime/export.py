"""Export the folder of a model to a package, checked against eager torch before it takes its place."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .package import FORMATS, INFO_FILE, Package, PackageInfo, load_package
from .program import DTYPES, NamedOutputs, example_inputs, export_program, load_model, model_info

# Largest ||y - y_torch|| / ||y_torch|| of an output, by dtype.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class ExportReport:
    """What was exported. Sizes are in bytes, those of models without configuration and tokenizer.

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
        """Return a JSON-able dict."""
        return {"version": 1, "kron_kernels": __version__, **dataclasses.asdict(self)}


def export_model(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    dense_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a model as a package that ``load_package`` runs, batch and sequence free.

    Args:
        model_dir: folder of a KronBert model, what ``compress`` writes, or of a dense BERT; any head.
        out: file to make. Its suffix is the format: ``.pt2`` is a program saved by torch.export, ``.onnx`` an ONNX
            model, each Kronecker layer a reshape and two MatMuls. It appears whole and checked, or not at all.
        dtype: of weights and arithmetic, "fp32" or "bf16"; ONNX takes fp32 alone, since onnxruntime lacks bf16 on CPUs.
        dense_dir: folder of the dense model, whose size is reported too.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is False, or is a folder.
        OSError: a missing, damaged or incomplete model.
        ValueError: another suffix or dtype, another architecture.
        RuntimeError: outputs that do not agree with eager torch, a missing optional package.
    """
    start = time.perf_counter()
    target = Path(out)
    _check_request(target, dtype, overwrite)
    model_bytes = weight_bytes(model_dir)
    dense_bytes = None if dense_dir is None else weight_bytes(dense_dir, "dense")
    model = NamedOutputs(load_model(model_dir, DTYPES[dtype])).eval()
    info = model_info(model, FORMATS[target.suffix])
    program = export_program(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial = folder / target.name
        nodes = write_package(program, info, partial)
        errors = package_errors(load_package(partial), model)
        # Not "greater": an error that is no number must fail too.
        if wrong := {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}:
            listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
            raise RuntimeError(
                f"the package does not agree with eager torch: {listed}, the tolerance is {TOLERANCE[dtype]:.0e}"
            )
        package_bytes = partial.stat().st_size
        os.replace(partial, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ExportReport(
        source=str(model_dir),
        target=str(target),
        format=info.format,
        dtype=dtype,
        architecture=info.architecture,
        outputs=info.outputs,
        package_bytes=package_bytes,
        model_bytes=model_bytes,
        dense_bytes=dense_bytes,
        errors=errors,
        tolerance=TOLERANCE[dtype],
        nodes=nodes,
        seconds=time.perf_counter() - start,
    )


def package_errors(package: Package, model: NamedOutputs) -> dict[str, float]:
    """Each output's largest relative error against the eager model, over a padded batch, one token, the longest input.

    The inputs differ in shape from those that the program was traced with. Outputs at padding positions are not
    compared: models may leave them out.
    """
    longest = package.info.max_sequence
    errors = dict.fromkeys(package.info.outputs, 0.0)
    for seed, shape in enumerate(((4, min(5, longest)), (1, 1), (2, longest)), start=1):
        inputs = example_inputs(model.model.config, *shape, seed=seed)
        with torch.inference_mode():
            wanted = model(**inputs)
        real = inputs["attention_mask"].bool()
        for name, got in package(**inputs).items():
            want = wanted[name]
            if got.shape != want.shape:
                raise RuntimeError(f"{name}: expected shape {tuple(want.shape)}, the package gives {tuple(got.shape)}")
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


def write_package(program: torch.export.ExportedProgram, info: PackageInfo, path: Path) -> dict[str, int]:
    """Write a program in the format that ``info`` names and return ``nodes`` of the report."""
    if info.format == "onnx":
        from .onnx import write_onnx

        return write_onnx(program, info, path)
    # They would be written as a pickle.
    program.example_inputs = None
    torch.export.save(program, path, extra_files={Path(INFO_FILE).name: info.to_json()})
    names = (str(node.target) for node in program.graph.nodes)
    return dict(Counter(name.split(".")[1] for name in names if name.startswith("kron_kernels.")).most_common())


def _check_request(target: Path, dtype: str, overwrite: bool) -> None:
    if target.suffix not in FORMATS:
        raise ValueError(f"out: expected a name ending in {' or '.join(FORMATS)}, got {target}")
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype: expected one of {', '.join(map(repr, TOLERANCE))}, got {dtype!r}")
    if target.suffix == ".onnx" and dtype != "fp32":
        raise ValueError(f"dtype: expected 'fp32' for ONNX, got {dtype!r}; onnxruntime lacks it on CPUs")
    if target.is_dir():
        raise FileExistsError(f"out: expected a file, got the folder {target}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"out: {target} exists; remove it, or ask to overwrite it")
