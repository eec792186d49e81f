"""From a BERT checkpoint on disk to a compressed one: load, calibrate, factor, save."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from ..convert.agreement import hidden_agreement
from ..convert.calibrate import Progress
from ..convert.counting import linear_flops
from ..convert.presets import KronConfig, preset
from ..convert.quantize import quantize_
from .checkpoint import ARCHITECTURES, copy_companions, load_dense, load_tokenizer, looks_local
from .files import new_folder
from .report import CompressReport
from .starts import WARM_STARTS, start_model
from .target import REPORT_NAME, check_target
from .text import MAX_LENGTH, read_lines, text_batches

# Batches that the agreement with the dense model is measured on.
_COMPARED = 4


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
        out_dir: folder to make. It appears whole or not at all, whatever kills the process.
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
        overwrite: replace ``out_dir`` where it holds a compressed model; anything else is left alone.
        progress: called as ``progress(done, total, what)``.

    Raises:
        FileExistsError: ``out_dir`` exists and ``overwrite`` is False, or it holds something else.
        OSError: a missing or damaged checkpoint or text, a folder that cannot be written, a full disk.
        ValueError: an architecture that is not supported, a checkpoint that is compressed already, a config that does
            not fit, an empty text, a warm start that needs text without any, an ``out_dir`` that holds model or text.
    """
    began = time.perf_counter()
    method = _method(warm_start, calibrate_text is not None)
    if isinstance(config, str):
        preset(config)  # an unknown name fails before the model is read
    sources = [model_dir] if looks_local(model_dir) else []
    sources += [] if calibrate_text is None else [calibrate_text]
    target = check_target(out_dir, overwrite, sources)
    sentences = [] if calibrate_text is None else read_lines(calibrate_text, calibrate_lines)
    dense = load_dense(model_dir)
    kron = _config(config, dense, terms, weight_dtype)
    batches = text_batches(dense, model_dir, sentences)
    floating = dataclasses.replace(kron, weight_dtype=None)
    kind = ARCHITECTURES[type(dense).__name__]
    model, calibration, blocks = start_model(
        kind, dense, floating, batches, method=method, steps=warm_start_steps, progress=progress
    )
    quantization = None if kron.weight_dtype is None else quantize_(model, batches)
    report = CompressReport(
        source=str(model_dir),
        target=str(out_dir),
        architecture=type(model).__name__,
        conversion=dataclasses.replace(model.conversion_report, config=kron),
        calibration_lines=len(sentences),
        calibration_tokens=max(calibration.tokens.values()) if calibration else 0,
        linear_flops_before=linear_flops(dense, MAX_LENGTH, kron),
        linear_flops_after=linear_flops(model, MAX_LENGTH, kron),
        seconds=time.perf_counter() - began,
        quantization=quantization,
        warm_start=method,
        blocks=blocks,
        agreement=hidden_agreement(dense, model.eval(), batches[:: -(-len(batches) // _COMPARED)], centred=True),
    )
    with new_folder(target, replace=overwrite) as folder:
        model.save_pretrained(folder)
        if Path(model_dir).is_dir():
            copy_companions(Path(model_dir), folder)
        else:
            load_tokenizer(model_dir).save_pretrained(folder)
        (folder / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        check_target(target, overwrite, sources)
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
