"""Teachers and students from folders: a student made from its teacher, or one that takes the teacher's head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from .. import models
from ..compress import ARCHITECTURES, load_dense
from ..models import KronBertConfig, KronBertPreTrainedModel
from ..nn import is_quantized
from .data.tasks import Task

_HEADS = {
    "classification": "BertForSequenceClassification",
    "regression": "BertForSequenceClassification",
    "qa": "BertForQuestionAnswering",
}


def load_model(folder: str | os.PathLike[str]) -> Any:
    """Load the BERT of a checkpoint folder or hub name, dense or KronBert, in the class its configuration names.

    Raises OSError for what cannot be loaded, and for a checkpoint that lacks weights other than a pooler's.
    """
    config = model_config(folder)
    if config.model_type != KronBertConfig.model_type:
        return load_dense(folder)
    kind = getattr(models, config.architectures[0])
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    except SafetensorError as error:
        raise OSError(f"model: damaged checkpoint {folder}: {error}") from error
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise OSError(f"model: {folder} lacks {len(missing)} weights, among them {missing[0]}")
    return model.eval()


def load_student(folder: str | os.PathLike[str]) -> Any:
    """Load a model to train, as ``load_model``; ValueError for one with factors stored as integers."""
    student = load_model(folder)
    if is_quantized(student):
        raise ValueError("student: expected factors in floating point to train, got integers; quantize afterwards")
    return student


def model_config(folder: str | os.PathLike[str]) -> Any:
    """Load the configuration of a checkpoint folder or hub name; OSError for what is neither."""
    if Path(folder).exists() and not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a folder with config.json, got {folder}")
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=Path(folder).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise OSError(f"model: {folder} cannot be loaded, from a folder or the hub: {error}") from error


def with_task_head(model: Any, task: Task, seed: int = 0) -> Any:
    """Put ``model`` in the class of the task, its head drawn from ``seed`` unless it has one for as many labels."""
    architecture = _HEADS[task.kind]
    labels = task.num_labels
    if isinstance(model, KronBertPreTrainedModel):
        target: Any = ARCHITECTURES[architecture]
    else:
        target = getattr(transformers, architecture)
    if isinstance(model, target) and model.config.num_labels == labels:
        return model
    config = type(model.config).from_dict({**model.config.to_dict(), "architectures": [architecture]})
    config.num_labels = labels
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        headed = target(config)
    _copy_encoder(model, headed)
    return headed.eval()


def with_teachers_head(student: Any, teacher: Any) -> Any:
    """Make a KronBert of the teacher's class: the student's encoder under the teacher's pooler and head, copied."""
    target = ARCHITECTURES[type(teacher).__name__]
    if type(student) is target:
        return student
    config = KronBertConfig.from_dense(teacher.config, student.config.kron)
    config.max_position_embeddings = student.config.max_position_embeddings
    options = {"add_pooling_layer": teacher.pooler is not None} if target is models.KronBertModel else {}
    headed = target(config, **options)
    _copy_encoder(student, headed)
    headed.load_state_dict(
        {name: value for name, value in teacher.state_dict().items() if _is_head(name)}, strict=False
    )
    return headed.eval()


def set_dropout(model: nn.Module, share: float) -> None:
    """Set every dropout of ``model``, and what its configuration says of it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    config: Any = model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = share
    if getattr(config, "classifier_dropout", None) is not None:
        config.classifier_dropout = share


def _encoder(model: Any) -> Any:
    return getattr(model, "bert", model)


def _is_head(name: str) -> bool:
    """Whether a parameter of a BERT belongs to its pooler or to what comes after the encoder."""
    inner = name.removeprefix("bert.")
    return inner.startswith("pooler.") or not inner.startswith(("embeddings.", "encoder."))


def _copy_encoder(source: Any, target: Any) -> None:
    """Everything the two encoders have in common; a pooler only where ``source`` has one."""
    state = _encoder(source).state_dict()
    missing, unexpected = _encoder(target).load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.startswith("pooler.")]
    if wrong:
        raise ValueError(f"student: expected the encoder of a {type(target).__name__}, {wrong[0]} does not fit")
