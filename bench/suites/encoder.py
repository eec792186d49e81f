"""An encoder of BERT-base's configuration, random weights: dense, compressed in both forms, and other libraries.

The training form has plain parameters; the inference form is what ``optimize_for_inference`` makes.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.baselines import ENCODERS, REST_SECONDS
from bench.suites import Point
from bench.suites.layers import DTYPES
from kron_kernels import optimize_for_inference
from kron_kernels.testing.encoder import (
    EncoderCandidate,
    EncoderProblem,
    as_it_is,
    encoders,
    forward,
    inference_form,
    random_ids,
)
from kron_kernels.testing.memory import peak_memory_growth
from kron_kernels.testing.timing import Timing

SECONDS = 1.5
COLUMNS = ("parameters",)
PRESETS = ("K8", "K21")
INFERENCE, COMPILED, HALF = ", inference form", ", compiled", "DistilBERT, half the layers"
OURS = tuple(preset + form for preset in PRESETS for form in ("", INFERENCE))
# Rounding to int8 is an error of another kind than rounding to a float type: it is shown, and held to this.
INT8_TOLERANCE = 0.1
SIZES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 60,
    },
}
MAIN, SWEEP = ("1x128", "8x128", "1x16"), ("1x32", "1x64", "1x256", "1x512", "2x128", "4x128", "16x128")


def points(quick: bool) -> list[Point]:
    """The shapes of the tables first, then those of the plot."""
    if quick:
        return [Point("tiny", "forward", "fp32", "2x8")]
    return [Point("bert-base", "forward", dtype, shape) for some in (MAIN, SWEEP) for dtype in DTYPES for shape in some]


def groups(point: Point) -> list[tuple[str, ...]]:
    """Other libraries have thread pools of their own: each is timed beside dense in its own process."""
    if point.input in SWEEP:
        return [("dense", *OURS)]
    ours = ("dense", "dense" + COMPILED, *OURS, HALF)
    if point.dtype == "bf16":
        return [ours, ("dense", "OpenVINO")]
    return [ours, ("dense", "OpenVINO", "OpenVINO, int8"), ("dense", "ONNX Runtime", "ONNX Runtime, int8")]


class Problem(EncoderProblem):
    """The ids of a point and the models of its dtype."""

    def __init__(self, point: Point) -> None:
        self.models = _models(point.case, point.dtype)
        super().__init__(random_ids(self.models["dense"], *point.sizes))


@functools.cache
def _models(case: str, dtype: str) -> dict[str, nn.Module]:
    return encoders(PRESETS, DTYPES[dtype], **SIZES[case])


problem = Problem


def candidate(problem: Problem, name: str) -> EncoderCandidate:
    dense = as_it_is("dense", problem.models["dense"])
    if name in problem.models:
        return as_it_is(name, problem.models[name])
    if name == HALF:
        return as_it_is(name, _half(problem.models["dense"]))
    if name in ENCODERS:
        tolerance = INT8_TOLERANCE if "int8" in name else dense.tolerance
        return EncoderCandidate(name, dense.model, _peer(dense.model, name), tolerance, REST_SECONDS)
    model = problem.models[name.partition(",")[0]]
    if name.endswith(COMPILED):
        torch.compiler.reset()
        run = functools.partial(forward, torch.compile(model, dynamic=False))
        return EncoderCandidate(name, model, run, dense.tolerance)
    return _inference_form(name, model)


@functools.cache
def _peer(model: nn.Module, name: str) -> Any:
    """Converting takes long: once for all shapes of a process."""
    return ENCODERS[name](model)


_inference_form = functools.cache(inference_form)


@functools.cache
def _half(dense: Any) -> nn.Module:
    """Half the layers of the dense model, as DistilBERT has them: no token types and no pooler."""
    from transformers import DistilBertConfig, DistilBertModel

    config = dense.config
    half = DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        n_layers=config.num_hidden_layers // 2,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
    )
    return DistilBertModel(half).to(next(dense.parameters()).dtype).eval()


def columns(
    problem: Problem, candidate: EncoderCandidate, timings: Mapping[str, Timing | None]
) -> dict[str, int | float]:
    return {"parameters": sum(each.numel() for each in candidate.model.parameters())}


def memory_names(point: Point) -> tuple[str, ...]:
    return ("dense", *OURS) if point.input in (MAIN[0], "2x8") else ()


def memory(point: Point, name: str) -> int | None:
    """Return what loading a checkpoint and running it add to the process at the peak, in bytes."""
    from transformers import BertConfig, BertModel

    from kron_kernels.models import KronBertConfig, KronBertModel

    preset, _, form = name.partition(",")
    kind: Any = BertModel if preset == "dense" else KronBertModel
    config = BertConfig(**SIZES[point.case]) if preset == "dense" else KronBertConfig(kron=preset, **SIZES[point.case])
    with tempfile.TemporaryDirectory() as folder:
        kind(config).to(DTYPES[point.dtype]).save_pretrained(folder)

        def load_and_run(path: Path) -> Any:
            model = kind.from_pretrained(path, dtype=DTYPES[point.dtype]).eval()
            model = optimize_for_inference(model) if form else model
            return model, [forward(model, random_ids(model, *point.sizes)) for _ in range(3)]

        return peak_memory_growth(lambda: load_and_run(Path(folder)))
