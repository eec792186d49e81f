"""From the folder of a model to an exported program with free batch and sequence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..backends import keep_ops
from .package import INPUTS, PackageInfo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class NamedOutputs(nn.Module):
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


def load_model(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto") -> Any:
    """Load the model in a folder, KronBert or BERT, in the class its configuration names; in evaluation mode.

    An encoder saved without its pooler is loaded without one. ``dtype`` "auto" is that of the checkpoint. No code from
    the folder is run. Raises FileNotFoundError for a folder without config.json, ValueError for other architectures,
    OSError for a damaged checkpoint and for one whose weights are not those of its configuration.
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
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except SafetensorError as error:
        raise OSError(f"model: damaged checkpoint {path}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = None
    elif missing:
        raise OSError(f"model: {path} lacks {len(missing)} weights of its configuration, among them {missing[0]}")
    if unexpected := sorted(info["unexpected_keys"]):
        raise OSError(
            f"model: {path} has {len(unexpected)} weights that its configuration has no place for, among them "
            f"{unexpected[0]}"
        )
    return model.eval()


def is_kron(model: nn.Module) -> bool:
    """Whether a model of ``load_model`` has Kronecker layers."""
    from ..models import KronBertPreTrainedModel

    return isinstance(model, KronBertPreTrainedModel)


def model_info(model: NamedOutputs, format: str) -> PackageInfo:
    """Describe a model for a package of it; the names of the outputs come from a call on one token."""
    config = model.model.config
    with torch.inference_mode():
        outputs = model(**example_inputs(config, 1, 1))
    names = {dtype: name for name, dtype in DTYPES.items()}
    return PackageInfo(
        format=format,
        architecture=type(model.model).__name__,
        dtype=names[next(iter(outputs.values())).dtype],
        outputs=tuple(outputs),
        max_sequence=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        types=config.type_vocab_size,
        torch=torch.__version__,
        kron_kernels=__version__,
    )


def example_inputs(config: Any, batch: int, sequence: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw random inputs of a model; from the second row on the last columns are padding, one more in each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, sequence)
    kept = sequence - torch.arange(batch).clamp(max=sequence - 1)
    values = (
        torch.randint(0, config.vocab_size, shape, generator=generator),
        (torch.arange(sequence) < kept.unsqueeze(1)).long(),
        torch.randint(0, config.type_vocab_size, shape, generator=generator),
    )
    return dict(zip(INPUTS, values, strict=True))


def export_program(model: NamedOutputs) -> torch.export.ExportedProgram:
    """Trace the model with free batch and sequence; Kronecker layers become calls of the ops of kron_kernels."""
    config = model.model.config
    longest = config.max_position_embeddings
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=longest)}
    # Sizes of 0 and 1 would be taken for constants.
    inputs = example_inputs(config, 3, min(7, longest))
    with keep_ops(), torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(INPUTS, axes))
    # Where each node came from, with file paths: a quarter of a small package.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
