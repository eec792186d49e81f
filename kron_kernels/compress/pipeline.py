"""From a BERT checkpoint on disk to a compressed one: load, calibrate, factor, save."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from .. import __version__
from ..convert.calibrate import Progress
from ..convert.counting import linear_flops
from ..convert.kronify import ConversionReport
from ..convert.presets import KronConfig, preset
from ..convert.quantize import QuantizationReport, quantize_
from .blockwise import WarmStartReport
from .checkpoint import ARCHITECTURES, copy_companions, load_dense
from .files import new_folder
from .starts import WARM_STARTS, start_model
from .text import MAX_LENGTH, read_lines, text_batches

REPORT_NAME = "compression_report.json"


@dataclass(frozen=True)
class CompressReport:
    """What was compressed, how, and what it came to. Operations are those of the linear layers on 128 tokens."""

    source: str
    target: str
    architecture: str
    conversion: ConversionReport
    calibration_lines: int
    calibration_tokens: int
    linear_flops_before: int
    linear_flops_after: int
    seconds: float
    quantization: QuantizationReport | None
    warm_start: str
    blocks: WarmStartReport | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        converted = {"conversion": self.conversion.to_dict()}
        if self.quantization is not None:
            converted["quantization"] = self.quantization.to_dict()
        if self.blocks is not None:
            converted["blocks"] = self.blocks.to_dict()
        return {"version": 1, "kron_kernels": __version__, **fields, **converted}


def compress(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: str | KronConfig,
    *,
    calibrate_text: str | os.PathLike[str] | None = None,
    calibrate_lines: int = 2000,
    warm_start: str | None = None,
    warm_start_steps: int = 300,
    terms: int | None = None,
    weight_dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a BERT checkpoint and save the result as a KronBert one, with its tokenizer and a report.

    Args:
        model_dir: folder of a transformers BERT checkpoint (plain, or with a masked-LM, pre-training, classification or
            question-answering head), or the name of one on the model hub.
        out_dir: folder to make. It appears whole or not at all.
        config: a preset's name or a KronConfig.
        calibrate_text: text file, a sentence a line, for a warm start; None fits the weights alone.
        calibrate_lines: how many of its lines to use.
        warm_start: "plain" fits the weights alone, "data-aware" the outputs of the layers on the text (``kronify_``),
            "blockwise" then trains each block on it (``warm_start.warm_start``), which is best and takes minutes. None
            is "blockwise" where there is text, else "plain".
        warm_start_steps: steps a block of "blockwise".
        terms: Kronecker products to sum in each linear layer; None keeps the config's.
        weight_dtype: "int8" stores large factors as int8 (see ``quantize_``); None leaves that to the config. The
            report then holds the agreement of the outputs with those of the factors before, on the lines of the text
            or, without one, on random token ids.
        overwrite: replace an existing ``out_dir``.
        progress: called as ``progress(done, total, what)``.

    Raises:
        FileExistsError: ``out_dir`` exists and ``overwrite`` is False.
        OSError: a missing or damaged checkpoint or text.
        ValueError: an architecture that is not supported, a config that does not fit, an empty text, a warm start that
            needs text without any.
    """
    began = time.perf_counter()
    target = Path(out_dir)
    method = _method(warm_start, calibrate_text is not None)
    _check_target(target, overwrite, model_dir)
    dense = load_dense(model_dir)
    kron = _config(config, dense, terms, weight_dtype)
    flops_before = linear_flops(dense, MAX_LENGTH, kron)
    sentences = [] if calibrate_text is None else read_lines(calibrate_text, calibrate_lines)
    batches = text_batches(dense, model_dir, sentences)
    floating = dataclasses.replace(kron, weight_dtype=None)
    kind = ARCHITECTURES[type(dense).__name__]
    model, calibration, blocks = start_model(
        kind, dense, floating, batches, method=method, steps=warm_start_steps, progress=progress
    )
    quantization = None if kron.weight_dtype is None else quantize_(model, batches)
    report = CompressReport(
        source=str(model_dir),
        target=str(target),
        architecture=type(model).__name__,
        conversion=dataclasses.replace(model.conversion_report, config=kron),
        calibration_lines=len(sentences),
        calibration_tokens=max(calibration.tokens.values()) if calibration else 0,
        linear_flops_before=flops_before,
        linear_flops_after=linear_flops(model, MAX_LENGTH, kron),
        seconds=time.perf_counter() - began,
        quantization=quantization,
        warm_start=method,
        blocks=blocks,
    )
    _save(model, report, model_dir, target)
    return report


def _method(warm_start: str | None, has_text: bool) -> str:
    method = ("blockwise" if has_text else "plain") if warm_start is None else warm_start
    if method not in WARM_STARTS:
        raise ValueError(f"warm_start: expected one of {', '.join(WARM_STARTS)}, got {method!r}")
    if method != "plain" and not has_text:
        raise ValueError(f"warm_start: expected text to calibrate on for {method!r}, got none")
    return method


def _config(config: str | KronConfig, dense: Any, terms: int | None, weight_dtype: str | None) -> KronConfig:
    sizes = (dense.config.hidden_size, dense.config.intermediate_size)
    kron = preset(config, *sizes) if isinstance(config, str) else config
    if weight_dtype is not None:
        kron = dataclasses.replace(kron, weight_dtype=weight_dtype)
    if terms is None:
        return kron
    # More terms of an embedding would only cost: its error is what the distillation takes care of first.
    rules = {
        role: rule if role == "embedding" else dataclasses.replace(rule, terms=terms)
        for role, rule in kron.rules.items()
    }
    return dataclasses.replace(kron, rules=rules)


def _check_target(target: Path, overwrite: bool, model_dir: str | os.PathLike[str]) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"out: {target} exists; remove it, or ask to overwrite it")
    if not target.is_dir():
        raise FileExistsError(f"out: expected a folder to overwrite, got the file {target}")
    source, resolved = Path(model_dir).resolve(), target.resolve()
    if source == resolved or resolved in source.parents:
        raise ValueError(f"out: {target} holds the model itself")


def _save(model: Any, report: CompressReport, model_dir: str | os.PathLike[str], target: Path) -> None:
    with new_folder(target) as partial:
        model.save_pretrained(partial)
        if Path(model_dir).is_dir():
            copy_companions(Path(model_dir), partial)
        else:
            transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(partial)
        (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
