"""From a BERT checkpoint on disk to a compressed one: load, calibrate, factor, save."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from .. import __version__, models
from ..convert.calibrate import Calibration, calibrate
from ..convert.counting import linear_flops
from ..convert.kronify import ConversionReport
from ..convert.presets import KronConfig, preset
from ..convert.quantize import QuantizationReport, quantize_
from ..nn import KronLinear
from .blockwise import WarmStartReport
from .files import new_folder
from .starts import WARM_STARTS, linear_names, start_model

Progress = Callable[[int, int, str], None]

REPORT_NAME = "compression_report.json"
BATCH = 32
MAX_LENGTH = 128
ARCHITECTURES: Mapping[str, type[Any]] = {
    "BertModel": models.KronBertModel,
    "BertForMaskedLM": models.KronBertForMaskedLM,
    "BertForPreTraining": models.KronBertForPreTraining,
    "BertForSequenceClassification": models.KronBertForSequenceClassification,
    "BertForQuestionAnswering": models.KronBertForQuestionAnswering,
}
# What a tokenizer and the sentence-transformers wrapping keep beside the weights.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling", "2_Normalize"),
)


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
    batches = _batches(dense, model_dir, sentences)
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


def load_dense(model_dir: str | os.PathLike[str]) -> Any:
    """The dense BERT of a checkpoint, in the class its configuration names; errors as :func:`compress`."""
    path = Path(model_dir)
    if path.exists() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a folder with config.json, got {path}")
    local = path.is_dir()
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=local)
    except (OSError, ValueError) as error:
        raise OSError(
            f"model: {model_dir} is neither a checkpoint folder nor to be had from the hub: {error}"
        ) from error
    architecture = (config.architectures or ["BertModel"])[0]
    if config.model_type != "bert" or architecture not in ARCHITECTURES:
        raise ValueError(
            f"model: expected a BERT checkpoint ({', '.join(ARCHITECTURES)}), got {architecture} of type "
            f"{config.model_type!r}; kronify_ converts other encoders in memory"
        )
    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            model_dir, local_files_only=local, dtype="auto", output_loading_info=True
        )
    except SafetensorError as error:
        raise OSError(f"model: damaged checkpoint {model_dir}: {error}") from error
    # Encoders are often saved without their pooler; anything else that is missing would be noise.
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise OSError(f"model: {model_dir} lacks {len(missing)} weights, among them {missing[0]}")
    return model.eval()


def read_lines(text: str | os.PathLike[str], most: int) -> list[str]:
    """The first ``most`` lines of a UTF-8 text file that are not blank; ValueError where there is none."""
    if most < 1:
        raise ValueError(f"calibrate_lines: expected at least 1, got {most}")
    try:
        lines = [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"calibrate: expected UTF-8 text, got {text}: {error}") from error
    lines = [line for line in lines if line][:most]
    if not lines:
        raise ValueError(f"calibrate: expected text, a sentence a line, got {text} without any")
    return lines


def tokenize(tokenizer: Any, sentences: list[str], max_length: int = MAX_LENGTH) -> list[dict[str, torch.Tensor]]:
    """Padded batches of ``input_ids`` and ``attention_mask``, each (up to 32, length).

    Sentences of like length go together, so the order of the sentences is not kept.
    """
    ordered = sorted(sentences, key=len)
    batches = []
    for start in range(0, len(ordered), BATCH):
        encoded = tokenizer(
            ordered[start : start + BATCH], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return batches


def calibrate_on(
    model: nn.Module,
    tokenizer_dir: str | os.PathLike[str],
    sentences: list[str],
    config: KronConfig,
    progress: Progress | None = None,
) -> Calibration:
    """Input moments, on these sentences, of the linear layers of ``model`` that ``config`` will replace."""
    return calibrate(model, _batches(model, tokenizer_dir, sentences), linear_names(model, config), progress)


def _batches(model: Any, tokenizer_dir: str | os.PathLike[str], sentences: list[str]) -> list[dict[str, torch.Tensor]]:
    """The sentences, tokenized; random token ids (8, 64) where there are none."""
    if not sentences:
        length = min(64, model.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        return [{"input_ids": torch.randint(model.config.vocab_size, (8, length), generator=generator)}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=Path(tokenizer_dir).is_dir())
    return tokenize(tokenizer, sentences, min(MAX_LENGTH, model.config.max_position_embeddings))


def output_errors(dense: nn.Module, model: nn.Module, moments: Calibration) -> dict[str, float]:
    """Relative error of each compressed linear layer's output, ``||y - y_kron|| / ||W x||``, by the layer's name.

    The inputs x are those behind ``moments``: a calibration of ``dense`` on text that the fit has not seen tells how
    it generalises. With D the difference of the weights, d that of the biases, C and u the second moment and the mean
    of x, the mean of ``||D x + d||^2`` is the trace of ``D C D^T`` plus ``2 d . D u + ||d||^2``.
    """
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, KronLinear):
            linear: Any = dense.get_submodule(name)
            moment, weight = moments[name].double(), linear.weight.detach().double()
            difference = weight - module.dense_weight().detach().double()
            shift = torch.zeros(len(weight)) if module.bias is None else (linear.bias - module.bias).detach()
            shift = shift.to(weight)
            squared = (difference @ moment * difference).sum()
            squared += shift @ (2 * difference @ moments.input_mean[name].double() + shift)
            errors[name] = float((squared / (weight @ moment * weight).sum()).sqrt())
    return errors


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
            _copy_companions(Path(model_dir), partial)
        else:
            transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(partial)
        (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def _copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)
