"""From a BERT checkpoint on disk to a compressed one: load, calibrate, factor, save."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertModel

from ..convert.agreement import hidden_agreement
from ..convert.calibrate import Calibration, Progress, calibrate
from ..convert.counting import count_parameters, linear_flops
from ..convert.presets import KronConfig, preset
from ..convert.quantize import quantize_
from ..convert.rules import ShapeRule
from ..nn.quantized import check_weight_dtype
from .checkpoint import (
    ARCHITECTURES,
    copy_companions,
    limit_length,
    load_dense,
    load_tokenizer,
    looks_local,
    pools_by_mean,
    shorten_positions_,
)
from .files import new_folder
from .plan import EVERY_LAYER, Plan, Planner, parse_size
from .report import CompressReport
from .starts import WARM_STARTS, linear_names, start_model
from .target import REPORT_NAME, check_target
from .text import MAX_LENGTH, read_lines, text_batches, token_counts

# Batches that the agreement with the dense model is measured on, and that plans are compared on.
_COMPARED, _PLANNED = 4, 12
# Lines of the text whose tokens are counted.
_COUNTED_LINES = 200_000


def compress(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: str | KronConfig | None = None,
    *,
    size: str | int | None = None,
    keep: float | None = None,
    max_length: int | None = None,
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
        size: instead of a config, the size to plan for (``Planner``): "8x" for eight times fewer parameters, or a
            number of parameters. Needs text; the plan is in the report and in config.json.
        keep: instead of both, plan for the smallest size whose similarities of sentences correlate that much with the
            dense model's before any training, 0.97 say; for the size that does best where none does.
        max_length: cut position rows beyond it.
        calibrate_text: text file, a sentence a line, for a warm start; None fits the weights alone.
        calibrate_lines: how many of its lines to use.
        warm_start: "plain" fits the weights alone, "data-aware" the outputs of the layers on the text (``kronify_``),
            "blockwise" then trains each block on it (``warm_start.warm_start``), which takes minutes. None is "plain"
            without text, "data-aware" for a ``size``, which distillation should follow, else "blockwise".
        warm_start_steps: steps a block of "blockwise".
        terms: Kronecker products to sum in each linear layer; None keeps the config's.
        weight_dtype: "int8" or "int4" stores large factors so (see ``quantize_``); None leaves that to the config. The
            report then holds the agreement of the outputs with those of the factors before, on the lines of the text
            or, without one, on random token ids.
        overwrite: replace ``out_dir`` where it holds a compressed model; anything else is left alone.
        progress: called as ``progress(done, total, what)``.

    Raises:
        FileExistsError: ``out_dir`` exists and ``overwrite`` is False, or it holds something else.
        OSError: a missing or damaged checkpoint or text, a folder that cannot be written, a full disk.
        ValueError: an architecture that is not supported, a checkpoint that is compressed already, a config that does
            not fit, an empty text, a warm start or a plan that needs text without any or with too little, a size that
            no plan meets, an ``out_dir`` that holds model or text.
    """
    began = time.perf_counter()
    given = [value for value in (config, size, keep) if value is not None]
    if len(given) != 1:
        raise ValueError(f"config: expected one of config, size and keep, got {len(given)} of them")
    method = _method(warm_start, calibrate_text is not None, planned=config is None)
    if isinstance(config, str):
        preset(config)  # an unknown name fails before the model is read
    if weight_dtype is not None:
        check_weight_dtype(weight_dtype)
    sources = [model_dir] if looks_local(model_dir) else []
    sources += [] if calibrate_text is None else [calibrate_text]
    target = check_target(out_dir, overwrite, sources)
    lines = [] if calibrate_text is None else read_lines(calibrate_text, _COUNTED_LINES)
    sentences = _different(lines, calibrate_lines)
    dense, dense_params = _load(model_dir, max_length)
    batches = text_batches(dense, model_dir, sentences)
    calibration, plan = None, None
    if method != "plain":
        known = EVERY_LAYER if config is None else _config(config, dense, None, None)
        calibration = _calibrate(dense, model_dir, lines, batches, known, progress)
        if config is None:
            plan = _plan(Planner(dense, calibration, _some(batches, _PLANNED), progress), size, keep, dense_params)
            config = plan.config
    assert config is not None
    kron = _config(config, dense, terms, weight_dtype)
    floating = dataclasses.replace(kron, weight_dtype=None)
    kind = ARCHITECTURES[type(dense).__name__]
    model, calibration, blocks = start_model(
        kind,
        dense,
        floating,
        batches,
        method=method,
        steps=warm_start_steps,
        calibration=calibration,
        progress=progress,
    )
    quantization = None if kron.weight_dtype is None else quantize_(model, batches, kron.weight_dtype)
    report = CompressReport(
        source=str(model_dir),
        target=str(out_dir),
        architecture=type(model).__name__,
        conversion=dataclasses.replace(model.conversion_report, config=kron, params_before=dense_params),
        calibration_lines=len(sentences),
        calibration_tokens=max(calibration.tokens.values()) if calibration is not None else 0,
        linear_flops_before=linear_flops(dense, MAX_LENGTH, kron),
        linear_flops_after=linear_flops(model, MAX_LENGTH, kron),
        seconds=time.perf_counter() - began,
        quantization=quantization,
        warm_start=method,
        blocks=blocks,
        agreement=hidden_agreement(dense, model.eval(), _some(batches, _COMPARED), centred=True),
        planned=None if plan is None else dict(plan.agreement),
    )
    with new_folder(target, replace=overwrite) as folder:
        model.save_pretrained(folder)
        if Path(model_dir).is_dir():
            copy_companions(Path(model_dir), folder)
        else:
            load_tokenizer(model_dir).save_pretrained(folder)
        if max_length is not None:
            limit_length(folder, max_length)
        (folder / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        check_target(target, overwrite, sources)
    return report


def plan_size(
    model_dir: str | os.PathLike[str],
    calibrate_text: str | os.PathLike[str],
    *,
    size: str | int | None = None,
    keep: float | None = None,
    max_length: int | None = None,
    calibrate_lines: int = 2000,
    progress: Progress | None = None,
) -> Plan:
    """Plan what ``compress`` would make of a checkpoint for a ``size`` or a share to ``keep``, without making it.

    The arguments are those of ``compress``, and so are the errors.
    """
    if (size is None) == (keep is None):
        raise ValueError(f"size: expected either a size or a share to keep, got size={size!r}, keep={keep!r}")
    lines = read_lines(calibrate_text, _COUNTED_LINES)
    sentences = _different(lines, calibrate_lines)
    dense, dense_params = _load(model_dir, max_length)
    batches = text_batches(dense, model_dir, sentences)
    calibration = _calibrate(dense, model_dir, lines, batches, EVERY_LAYER, progress)
    return _plan(Planner(dense, calibration, _some(batches, _PLANNED), progress), size, keep, dense_params)


def _plan(planner: Planner, size: str | int | None, keep: float | None, dense_params: int) -> Plan:
    if keep is not None:
        return planner.plan_keeping(keep)
    assert size is not None
    return planner.plan(parse_size(size, dense_params))


def _load(model_dir: str | os.PathLike[str], max_length: int | None) -> tuple[Any, int]:
    """The dense model without what is never used, and its parameters before that."""
    dense = load_dense(model_dir)
    params = count_parameters(dense)
    if max_length is not None:
        shorten_positions_(dense, max_length)
    if pools_by_mean(model_dir) and type(dense) is BertModel:
        dense.pooler = None
    return dense, params


def _different(lines: list[str], most: int) -> list[str]:
    """The first ``most`` different lines: a repeated one says nothing new."""
    if most < 1:
        raise ValueError(f"calibrate_lines: expected at least 1, got {most}")
    return list(dict.fromkeys(lines))[:most]


def _some(batches: list[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """At most ``count`` batches, of all lengths."""
    return batches[:: -(-len(batches) // count)]


def _calibrate(
    dense: Any,
    model_dir: str | os.PathLike[str],
    lines: list[str],
    batches: list[dict[str, Tensor]],
    config: KronConfig,
    progress: Progress | None,
) -> Calibration:
    calibration = calibrate(dense, batches, linear_names(dense, config), progress)
    if not isinstance(config.rules.get("embedding"), ShapeRule):
        # Bands are by frequency: more text than the fits need tells rare words apart.
        calibration.token_counts = token_counts(load_tokenizer(model_dir), lines, dense.config.vocab_size)
    return calibration


def _method(warm_start: str | None, has_text: bool, planned: bool) -> str:
    if planned and not has_text:
        raise ValueError("calibrate_text: expected text to plan on, got none")
    default = "plain" if not has_text else "data-aware" if planned else "blockwise"
    method = default if warm_start is None else warm_start
    if planned and method == "plain":
        raise ValueError("warm_start: expected 'data-aware' or 'blockwise' for a plan, got 'plain'")
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
        role: rule if role == "embedding" or not isinstance(rule, ShapeRule) else dataclasses.replace(rule, terms=terms)
        for role, rule in kron.rules.items()
    }
    return dataclasses.replace(kron, rules=rules)
