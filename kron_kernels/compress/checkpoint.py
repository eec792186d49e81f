"""The dense checkpoint: which architectures can be compressed, loading one, and the files beside its weights."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn

from .. import models
from ..factorize import BertSize

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
# Where those files keep a length in tokens to cut or pad sentences to.
_LENGTHS = (
    ("tokenizer.json", "truncation", "max_length"),
    ("tokenizer.json", "padding", "strategy", "Fixed"),
    ("tokenizer_config.json", "model_max_length"),
    ("sentence_bert_config.json", "max_seq_length"),
)

# More layers or parameters than any encoder has: building one for a broken configuration would take minutes.
_MOST_LAYERS = 1000
_MOST_PARAMETERS = 10**11


def looks_local(model: str | os.PathLike[str]) -> bool:
    """Tell whether ``model`` is a folder on this machine, there or not, rather than a name on the model hub."""
    path = Path(model)
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(model)) is not None
    return path.exists() or not is_name or (path.parent != Path(".") and path.parent.is_dir())


def load_dense(model_dir: str | os.PathLike[str]) -> Any:
    """Load the dense BERT of a checkpoint, in evaluation mode, in the class that its configuration names.

    Raises OSError for a checkpoint that is missing, damaged or without some of its weights, and ValueError for another
    architecture, an already compressed one, and sizes that are out of range or not those of the weights.
    """
    local = looks_local(model_dir)
    if local and not (Path(model_dir) / "config.json").is_file():
        what = "no config.json in it" if Path(model_dir).exists() else "nothing there (a hub name is owner/name)"
        raise FileNotFoundError(f"model: expected a checkpoint folder with config.json, got {model_dir}: {what}")
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, **options)
    except (OSError, ValueError, TypeError) as error:
        what = "has a damaged or unknown config.json" if local else "is not to be had from the model hub"
        raise OSError(f"model: {model_dir} {what}: {error}") from error
    architecture = (config.architectures or ["BertModel"])[0]
    if config.model_type == "kron_bert":
        raise ValueError(f"model: {model_dir} is compressed already; give the dense checkpoint that it was made from")
    if config.model_type != "bert" or architecture not in ARCHITECTURES:
        raise ValueError(
            f"model: expected a BERT checkpoint ({', '.join(ARCHITECTURES)}), got {architecture} of type "
            f"{config.model_type!r}; kronify_ converts other encoders in memory"
        )
    _check_sizes(config)
    try:
        model, info = getattr(transformers, architecture).from_pretrained(
            model_dir, dtype="auto", output_loading_info=True, **options
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise OSError(f"model: the weights in {model_dir} are damaged or do not fit config.json: {error}") from error
    # Encoders are often saved without their pooler; anything else that is missing would be noise.
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise OSError(f"model: {model_dir} lacks {len(missing)} weights, among them {missing[0]}")
    if beyond := sorted(key for key in info["unexpected_keys"] if "encoder.layer." in key):
        raise ValueError(
            f"model: {model_dir} has weights beyond its config.json's {config.num_hidden_layers} layers: {beyond[0]}"
        )
    return model.eval()


def _check_sizes(config: Any) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"model: expected a positive {name} in config.json, got {value!r}")
    if config.num_hidden_layers > _MOST_LAYERS:
        raise ValueError(
            f"model: expected at most {_MOST_LAYERS} layers, config.json asks for {config.num_hidden_layers}"
        )
    hidden, intermediate, layers, vocabulary, positions = (getattr(config, name) for name in names)
    if (count := BertSize(hidden, intermediate, vocabulary, layers, positions).dense_params()) > _MOST_PARAMETERS:
        raise ValueError(f"model: expected at most {_MOST_PARAMETERS:.0e} parameters, config.json asks for {count:.0e}")


def shorten_positions_(model: Any, length: int) -> None:
    """Cut the position table of a BERT, or of one with a head, after ``length`` rows, in place.

    Raises ValueError for a length of less than 1; a shorter table stays.
    """
    if length < 1:
        raise ValueError(f"max_length: expected at least 1, got {length}")
    embeddings = model.base_model.embeddings
    table = embeddings.position_embeddings
    if length < table.num_embeddings:
        embeddings.position_embeddings = nn.Embedding.from_pretrained(table.weight[:length].clone(), freeze=False)
        embeddings.position_ids = embeddings.position_ids[:, :length]
        embeddings.token_type_ids = embeddings.token_type_ids[:, :length]
        model.config.max_position_embeddings = length


def pools_by_mean(model_dir: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is a sentence-transformers encoder with mean pooling, which has no use for a pooler."""
    return bool(_read_mapping(Path(model_dir) / "1_Pooling" / "config.json").get("pooling_mode_mean_tokens"))


def load_tokenizer(model_dir: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a checkpoint; OSError where it is missing or damaged."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=looks_local(model_dir), trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises this very class
        raise OSError(f"model: {model_dir} has no tokenizer that loads: {error}") from error


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer's files and the sentence-transformers wrapping from one folder to another."""
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)


def limit_length(folder: Path, length: int) -> None:
    """Lower every length above ``length`` to which a tokenizer's files in a folder have it cut or pad sentences."""
    for name, *keys, last in _LENGTHS:
        content = _read_mapping(folder / name)
        place: Any = content
        for key in keys:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(last), int) and place[last] > length:
            place[last] = length
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
