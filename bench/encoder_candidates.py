"""The ways to a faster BERT that are timed beside ours: compiled, int8, ONNX Runtime, fewer layers.

``make_way`` gives an ``EncoderWay`` or raises ``Missing`` with the reason why it cannot run here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.candidates import Missing, module
from kron_kernels.cli.bench import DTYPES
from kron_kernels.testing.encoder import EncoderWay, encoders, forward, plain_way

# Rounding to int8 is an error of another kind than rounding to a float type: it is shown, and held to this.
INT8_TOLERANCE = 0.1
# Its threads spin for a while after each call.
ORT_REST_SECONDS = 0.05
# Peers that change other libraries by being importable lie in a folder of their own: transformers imports torchao.
APART = Path(sys.prefix) / "peers-apart"

INT8_TORCH, INT8_TORCHAO = "dense, int8 (torch.ao)", "dense, int8 (torchao, compiled)"
ORT, DISTIL = "dense, ONNX Runtime", "DistilBERT (half the layers)"
COMPILED_DENSE = "dense, compiled"


class Models:
    """The models of one dtype; each is made when first asked for, and kept.

    Args:
        dtype: "fp32" or "bf16".
        sizes: fields of transformers' BertConfig.
        presets: the compressed models to make besides the dense one.
    """

    def __init__(self, dtype: str, sizes: dict[str, int], presets: list[str]) -> None:
        self.dtype = DTYPES[dtype]
        self.by_name = encoders(presets, self.dtype, **sizes)

    @property
    def dense(self) -> nn.Module:
        return self.by_name["dense"]

    @functools.cached_property
    def int8_torch(self) -> nn.Module:
        if self.dtype is not torch.float32:
            raise Missing("float32 activations only")
        with _without_warnings():
            return torch.ao.quantization.quantize_dynamic(copy.deepcopy(self.dense), {nn.Linear}, dtype=torch.qint8)

    @functools.cached_property
    def int8_torchao(self) -> nn.Module:
        with _without_warnings(), _apart():
            quantization: Any = module("torchao.quantization")
            quantized = copy.deepcopy(self.dense)
            quantization.quantize_(quantized, quantization.Int8DynamicActivationInt8WeightConfig())
        return quantized

    @functools.cached_property
    def distil(self) -> nn.Module:
        """Half the layers of the dense model, DistilBERT's way; no token types and no pooler."""
        from transformers import DistilBertConfig, DistilBertModel

        config: Any = self.dense.config
        half = DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            n_layers=max(1, config.num_hidden_layers // 2),
            n_heads=config.num_attention_heads,
            dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
        )
        return DistilBertModel(half).to(self.dtype).eval()

    @functools.cached_property
    def ort_session(self) -> Any:
        """ONNX Runtime on the dense model, exported once for inputs of any shape."""
        if self.dtype is not torch.float32:
            raise Missing("float32 only")
        runtime: Any = module("onnxruntime")
        module("onnxscript")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        any_size = torch.export.Dim.DYNAMIC
        with tempfile.TemporaryDirectory() as folder, _without_warnings():
            path = str(Path(folder) / "dense.onnx")
            example = torch.zeros(2, 8, dtype=torch.int64)
            shapes = ({0: any_size, 1: any_size},)
            torch.onnx.export(
                _HiddenStates(self.dense).eval(), (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def names(presets: list[str]) -> tuple[str, ...]:
    """Every way there is, ours for each preset."""
    ours = [name for preset in presets for name in (preset, f"{preset}, compiled")]
    return ("dense", COMPILED_DENSE, *ours, INT8_TORCH, INT8_TORCHAO, ORT, DISTIL)


def sweep_names(presets: list[str], dtype: str) -> tuple[str, ...]:
    """Those that are shown over many input shapes: without what compiles anew for each, dense in float32 excepted."""
    return ("dense", *((COMPILED_DENSE, INT8_TORCH, ORT) if dtype == "fp32" else ()), *presets, DISTIL)


def make_way(name: str, models: Models) -> EncoderWay:
    """The way of that name; ``torch.compiler.reset()`` belongs before those of a new input shape."""
    if name in _OTHERS:
        return _OTHERS[name](models)
    base, _, compiled = name.partition(", ")
    if compiled:
        return _compiled(name, models.by_name[base])
    return plain_way(name, models.by_name[base])


def _compiled(name: str, model: nn.Module) -> EncoderWay:
    return _run_as(plain_way(name, model), torch.compile(model, dynamic=False))


def _run_as(way: EncoderWay, model: Any, **changes: Any) -> EncoderWay:
    return EncoderWay(**{**vars(way), "run": functools.partial(forward, model), **changes})


def _int8_torch(models: Models) -> EncoderWay:
    return _run_as(plain_way(INT8_TORCH, models.dense), models.int8_torch, tolerance=INT8_TOLERANCE)


def _int8_torchao(models: Models) -> EncoderWay:
    model = torch.compile(models.int8_torchao, dynamic=False)
    return _run_as(plain_way(INT8_TORCHAO, models.dense), model, tolerance=INT8_TOLERANCE)


def _ort(models: Models) -> EncoderWay:
    session = models.ort_session
    given = session.get_inputs()[0].name

    def run(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given: ids.numpy()})[0])

    return EncoderWay(**{**vars(plain_way(ORT, models.dense)), "run": run, "rest_seconds": ORT_REST_SECONDS})


_OTHERS: dict[str, Callable[[Models], EncoderWay]] = {
    INT8_TORCH: _int8_torch,
    INT8_TORCHAO: _int8_torchao,
    ORT: _ort,
    DISTIL: lambda models: plain_way(DISTIL, models.distil),
}


class _HiddenStates(nn.Module):
    """The model with the last hidden states as its only output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).last_hidden_state


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Peers that lie apart can be imported within."""
    sys.path.append(str(APART))
    try:
        yield
    finally:
        sys.path.remove(str(APART))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
