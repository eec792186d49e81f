"""The dense checkpoint: which architectures can be compressed, loading one, and the files beside its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from .. import models

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


def load_dense(model_dir: str | os.PathLike[str]) -> Any:
    """Load the dense BERT of a checkpoint, in the class its configuration names; errors as :func:`compress`."""
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


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer's files and the sentence-transformers wrapping from one folder to another."""
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)
