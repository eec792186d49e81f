"""A KronBert folder run as it is: its checkpoint through the ops of whole blocks, without transformers or an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from .. import __version__
from ..schemas.blocks import kron_embedding, kron_ffn, kron_matmul_norm, kron_pack, kron_qkv
from ..schemas.products import ACTIVATION_CODES, HUGGING_FACE_ACTIVATIONS
from .package import Package, PackageInfo

ARCHITECTURE = "KronBertModel"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class _Linear(NamedTuple):
    a: Tensor  # (S, m1, n1)
    b: Tensor  # (S, m2, n2)
    bias: Tensor
    packed: Tensor


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float


class _Layer(NamedTuple):
    qkv: tuple[_Linear, _Linear, _Linear]
    attention: _Linear
    attention_norm: _Norm
    ffn_in: _Linear
    ffn_out: _Linear
    ffn_norm: _Norm


class Encoder:
    """The forward pass of a KronBertModel from its tensors by name."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._eps = float(config["layer_norm_eps"])
        self._heads = int(config["num_attention_heads"])
        self._activation = ACTIVATION_CODES[HUGGING_FACE_ACTIVATIONS[config["hidden_act"]]]
        self._embedding_norm = self._norm("embeddings.LayerNorm")
        self._layers = [self._layer(f"encoder.layer.{index}") for index in range(config["num_hidden_layers"])]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``last_hidden_state (batch, sequence, hidden)`` and, with a pooler, ``pooler_output (batch, hidden)``."""
        tensors, ids, mask = self._tensors, inputs["input_ids"], inputs["attention_mask"].bool()
        words = "embeddings.word_embeddings"
        tables = (
            *(torch.arange(ids.shape[1]), tensors["embeddings.position_embeddings.weight"]),
            *(inputs["token_type_ids"], tensors["embeddings.token_type_embeddings.weight"]),
        )
        x = kron_embedding(ids, tensors[f"{words}.a"], tensors[f"{words}.b"], *tables, *self._embedding_norm)
        # A row of nothing but padding attends to itself: no softmax over nothing.
        seen = None if mask.all() else (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        for layer in self._layers:
            x = self._run(layer, x, seen)
        outputs = {"last_hidden_state": x}
        if "pooler.dense.weight" in tensors:
            pooled = F.linear(x[:, 0], tensors["pooler.dense.weight"], tensors["pooler.dense.bias"])
            outputs["pooler_output"] = pooled.tanh()
        return outputs

    def _run(self, layer: _Layer, x: Tensor, seen: Tensor | None) -> Tensor:
        a, b, bias, packed = (list(column) for column in zip(*layer.qkv, strict=True))
        split = (*x.shape[:2], self._heads, -1)
        q, k, v = (part.view(split).transpose(1, 2) for part in kron_qkv(x, a, b, bias, packed))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).reshape(x.shape)
        *factors, pack = layer.attention
        x = kron_matmul_norm(y, *factors, x, *layer.attention_norm, pack)
        *factors1, pack1 = layer.ffn_in
        *factors2, pack2 = layer.ffn_out
        return kron_ffn(x, *factors1, *factors2, self._activation, x, *layer.ffn_norm, pack1, pack2)

    def _layer(self, prefix: str) -> _Layer:
        attention = f"{prefix}.attention"
        query, key, value = (self._linear(f"{attention}.self.{name}") for name in ("query", "key", "value"))
        return _Layer(
            (query, key, value),
            self._linear(f"{attention}.output.dense"),
            self._norm(f"{attention}.output.LayerNorm"),
            self._linear(f"{prefix}.intermediate.dense"),
            self._linear(f"{prefix}.output.dense"),
            self._norm(f"{prefix}.output.LayerNorm"),
        )

    def _linear(self, name: str) -> _Linear:
        a, b, bias = (self._tensors[f"{name}.{part}"] for part in ("a", "b", "bias"))
        return _Linear(a, b, bias, kron_pack(a, b))

    def _norm(self, name: str) -> _Norm:
        return _Norm(self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"], self._eps)


def load_folder(folder: Path) -> Package:
    """See ``load_package``."""
    config = _read_config(folder)
    try:
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise FileNotFoundError(f"package: expected model.safetensors in {folder}, got none") from None
    except SafetensorError as error:
        raise OSError(f"{folder}: damaged checkpoint: {error}") from error
    try:
        encoder = Encoder(config, tensors)
        vocabulary = tensors["embeddings.word_embeddings.a"].shape[1]
        positions, types = (
            tensors[f"embeddings.{name}_embeddings.weight"].shape[0] for name in ("position", "token_type")
        )
    except KeyError as missing:
        raise OSError(f"{folder}: expected every layer factored, the checkpoint lacks {missing}") from missing
    pooler = ("pooler_output",) if "pooler.dense.weight" in tensors else ()
    info = PackageInfo(
        format="folder",
        architecture=ARCHITECTURE,
        dtype=_DTYPES[tensors["embeddings.word_embeddings.b"].dtype],
        outputs=("last_hidden_state", *pooler),
        max_sequence=positions,
        vocabulary=vocabulary,
        types=types,
        torch=torch.__version__,
        kron_kernels=__version__,
        cpu=torch.backends.cpu.get_cpu_capability(),
    )
    return Package(info, encoder)


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration, refused where this encoder would not compute what it says."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"package: expected a model folder, with config.json, got {folder}") from None
    except ValueError as error:
        raise OSError(f"{path}: damaged configuration: {error}") from error
    kron = config.get("kron")
    dtype = kron.get("weight_dtype") if isinstance(kron, Mapping) else None
    for name, found, expected in (
        ("architectures", config.get("architectures"), [ARCHITECTURE]),
        ("is_decoder", config.get("is_decoder", False), False),
        ("kron.weight_dtype", dtype, None),
    ):
        if found != expected:
            raise ValueError(f"{folder}: {name}: expected {expected}, got {found}; kron-kernels export takes others")
    if config.get("hidden_act") not in HUGGING_FACE_ACTIVATIONS:
        choices = ", ".join(HUGGING_FACE_ACTIVATIONS)
        raise ValueError(f"{folder}: hidden_act: expected one of {choices}, got {config.get('hidden_act')!r}")
    return config
