"""From a folder of a model to an exported program: loaded, wrapped to named tensors, captured with free axes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import keep_ops
from ..schemas import blocks
from .package import INPUTS


class Served(nn.Module):
    """A model of transformers as a function of three tensors ``(batch, sequence)`` that returns a dict of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        return dict(outputs.items())


def load_model(folder: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    """The model in a folder, KronBert or BERT, in the class its configuration names; in evaluation mode.

    An encoder saved without its pooler is loaded without one. Raises FileNotFoundError for a folder without
    config.json, ValueError for other architectures, OSError for a damaged or incomplete checkpoint.
    """
    import transformers
    from safetensors import SafetensorError

    from ..compress import ARCHITECTURES

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a model folder, with config.json, got {path}")
    classes = {name: getattr(transformers, name) for name in ARCHITECTURES}
    classes.update((kron.__name__, kron) for kron in ARCHITECTURES.values())
    try:
        names = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (ValueError, AttributeError) as error:
        raise OSError(f"model: damaged configuration {path / 'config.json'}: {error}") from error
    if not names or names[0] not in classes:
        raise ValueError(f"model: expected one of {', '.join(classes)}, got {names and names[0]} in {path}")
    try:
        model, info = classes[names[0]].from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise OSError(f"model: damaged checkpoint {path}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = None
    elif missing:
        raise OSError(f"model: {path} lacks {len(missing)} weights, among them {missing[0]}")
    return model.eval()


def example_inputs(config: Any, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a model; from the second row on the last columns are padding, one more in each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, sequence)
    kept = sequence - torch.arange(batch).clamp(max=sequence - 1)
    values = (
        torch.randint(0, config.vocab_size, shape, generator=generator),
        (torch.arange(sequence) < kept.unsqueeze(1)).long(),
        torch.randint(0, config.type_vocab_size, shape, generator=generator),
    )
    return dict(zip(INPUTS, values, strict=True))


def capture(served: Served) -> torch.export.ExportedProgram:
    """The model as a graph, batch and sequence free, Kronecker layers as calls of the ops of kron_kernels."""
    config = served.model.config
    longest = config.max_position_embeddings
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=longest)}
    # Sizes of 0 and 1 would be taken for constants.
    inputs = example_inputs(config, 3, min(7, longest))
    with keep_ops(), torch.no_grad():
        program = torch.export.export(served, (), inputs, dynamic_shapes=dict.fromkeys(INPUTS, axes))
    # Where each node came from, with paths of this machine: a quarter of a small package, and nobody's business.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def fill_lists(program: torch.export.ExportedProgram) -> None:
    """Give every ``kron_qkv`` of a program, in place, full lists of biases and packed factors.

    A program compiled by AOTInductor hands an op None for an empty list, which a compiled op takes for an error. Zeros
    and packed factors of no bytes mean the same as nothing.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=blocks.kron_qkv):
        x, a, b, bias, packed = node.args

        def zeros(like: Any, size: int, dtype: torch.dtype, before: Any = node) -> Any:
            with graph.inserting_before(before):
                made = graph.call_function(torch.ops.aten.new_zeros.default, (like, [size]), {"dtype": dtype})
            made.meta["val"] = like.meta["val"].new_zeros([size], dtype=dtype)
            return made

        pairs = [(left.meta["val"], right.meta["val"]) for left, right in zip(a, b, strict=True)]
        sizes = [left.shape[1] * right.shape[1] for left, right in pairs]
        bias = bias or [zeros(x, size, x.meta["val"].dtype) for size in sizes]
        packed = packed or [zeros(x, 0, torch.uint8) for _ in sizes]
        node.args = (x, a, b, bias, packed)
    program.graph_module.recompile()
