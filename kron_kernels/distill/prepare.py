"""What a stage needs before it can train: models that belong together, encoded data, an objective, a collator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import BertForPreTraining

from ..compress import ARCHITECTURES, WARM_STARTS, start_model
from ..compress.files import new_folder
from ..convert.calibrate import Progress
from ..convert.presets import preset
from ..models import KronBertPreTrainedModel
from .config import DistillConfig
from .data import (
    MaskingCollator,
    PaddingCollator,
    Task,
    encode,
    load_task,
    load_text,
    pack,
    qa_features,
    resolved,
    task_from,
)
from .evaluate import evaluate, load_tokenizer
from .losses import check_pair
from .objectives import Classification, MaskedLanguageModel, Objective, QuestionAnswering, Regression
from .run_folder import RunFolder
from .student import load_model, load_student, model_config, with_task_head, with_teachers_head

# Share of the packed sequences of stage 1 that is kept for its evaluation.
_HELD_OUT = 0.01
# Rows of the training data that a student is fitted to when it is made, their tokens at most, and rows a batch.
_FITTED_ROWS, _FITTED_TOKENS, _FITTED_BATCH = 2000, 100_000, 32


@dataclass
class Work:
    """Hold one run's models, data and labels, ready for a trainer."""

    config: DistillConfig  # with every number in place
    student: Any
    teacher: Any
    tokenizer: Any
    preset: str | None
    objective: Objective
    collator: Callable[[list[Any]], dict[str, torch.Tensor]]
    train: Any
    evaluation: Any
    name: str  # of the task or the text
    task: Task | None = None
    teacher_score: float | None = None
    scores: Callable[[nn.Module], Mapping[str, float]] | None = None


def prepare_task(config: DistillConfig, folder: RunFolder, progress: Progress | None = None) -> Work:
    """Prepare "finetune" and "task"; raises what ``run_stage`` raises."""
    columns = {name: getattr(config, name) for name in ("text", "text_pair", "label")}
    task = task_from(str(config.task), {name: column for name, column in columns.items() if column}, config.regression)
    if config.preset is not None:
        preset(config.preset)
    data = load_task(str(config.data), task, ("train", "validation"))
    task = resolved(task, data)
    train = data["train"]
    if config.train_limit is not None and config.train_limit < len(train):
        train = train.shuffle(seed=config.seed).select(range(config.train_limit))
    tokenizer = _tokenizer(config)
    teacher = None if config.teacher is None else _fine_tuned(config.teacher, task)
    loaded, preset_name, config = _resolved(config, teacher)
    length = config.max_length or 0

    def scores(model: Any) -> Mapping[str, float]:
        return evaluate(model, task, data, tokenizer=tokenizer, max_length=length).metrics

    objective: Objective
    if task.kind == "qa":
        encoded, objective = qa_features(train, tokenizer, length), QuestionAnswering()
    else:
        encoded = encode(train, tokenizer, task, length)
        objective = Regression() if task.kind == "regression" else Classification(task.num_labels)
    if teacher is None:
        student = with_task_head(loaded, task, config.seed)
    else:
        student = _student(config, loaded, teacher, tokenizer, encoded, folder, progress)
    return Work(
        config,
        student,
        teacher,
        tokenizer,
        preset_name,
        objective,
        PaddingCollator(tokenizer),
        encoded,
        data["validation"],
        task.name,
        task,
        None if teacher is None else scores(teacher)[task.main],
        scores,
    )


def prepare_pretraining(config: DistillConfig, folder: RunFolder, progress: Progress | None = None) -> Work:
    """Prepare "pretrain"; raises what ``run_stage`` raises."""
    if config.preset is not None:
        preset(config.preset)
    sources = [config.data] if isinstance(config.data, str) else list(config.data)
    documents = load_text(sources, config.text or "text")
    tokenizer = _tokenizer(config)
    teacher = load_model(str(config.teacher))
    if config.next_sentence and not isinstance(teacher, BertForPreTraining):
        raise ValueError(f"next_sentence: expected a BertForPreTraining as teacher, got {type(teacher).__name__}")
    loaded, preset_name, config = _resolved(config, teacher)
    length = config.max_length or 0
    packed = pack(documents, tokenizer, length, next_sentence=config.next_sentence, seed=config.seed)
    held_out = max(1, round(_HELD_OUT * len(packed)))
    if len(packed) <= held_out:
        raise ValueError(f"data: expected text for two sequences of {length} tokens at least, got {len(packed)}")
    packed = packed.shuffle(seed=config.seed)
    most = min(len(packed) - held_out, config.train_limit or len(packed))
    train = packed.select(range(held_out, held_out + most))
    student = _student(config, loaded, teacher, tokenizer, train, folder, progress)
    masked = hasattr(teacher, "cls")
    return Work(
        config,
        student,
        teacher,
        tokenizer,
        preset_name,
        MaskedLanguageModel() if masked else Objective(),
        MaskingCollator(tokenizer, config.seed) if masked else PaddingCollator(tokenizer),
        train,
        packed.select(range(held_out)),
        ", ".join(Path(source).name for source in sources),
    )


def _tokenizer(config: DistillConfig) -> Any:
    source = str(config.teacher or config.student)
    model_config(source)  # a folder without a model is better reported as such
    return load_tokenizer(source)


def _fine_tuned(folder: str, task: Task) -> Any:
    """The teacher, which must have the task's head already."""
    teacher = load_model(folder)
    if with_task_head(teacher, task) is not teacher:
        raise ValueError(
            f"teacher: expected a model fine-tuned on {task.name} ({task.num_labels} outputs), "
            f"got a {type(teacher).__name__} with {teacher.config.num_labels} labels; `kron-kernels distill finetune` "
            "makes one"
        )
    return teacher


def _resolved(config: DistillConfig, teacher: Any) -> tuple[Any, str | None, DistillConfig]:
    """The student where a folder has it, the name of its preset, and the configuration with every number in place."""
    loaded = None if config.student is None else load_student(config.student)
    name = config.preset
    if isinstance(loaded, KronBertPreTrainedModel):
        name = loaded.config.kron["name"]
    # A student's position table may be longer than its teacher's.
    shaped: Any = loaded if teacher is None else teacher
    return loaded, name, config.resolved(name, shaped.config.max_position_embeddings)


def _student(
    config: DistillConfig,
    loaded: Any,
    teacher: Any,
    tokenizer: Any,
    rows: Any,
    folder: RunFolder,
    progress: Progress | None,
) -> Any:
    """The one ``loaded``, or one made from the teacher and kept in the run's folder for a later start."""
    if loaded is not None:
        check_pair(teacher, loaded)
        return with_teachers_head(loaded, teacher)
    state = PartialState()
    if state.is_main_process and not folder.start_path.is_dir():
        made, _, _ = start_model(
            ARCHITECTURES[type(teacher).__name__],
            teacher,
            preset(str(config.preset), teacher.config.hidden_size, teacher.config.intermediate_size),
            _fitted(rows, tokenizer),
            method=config.warm_start or WARM_STARTS[-1],
            seed=config.seed,
            progress=progress,
        )
        with new_folder(folder.start_path) as start:
            made.save_pretrained(start)
    state.wait_for_everyone()
    return load_model(folder.start_path)


def _fitted(rows: Any, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """What a student is fitted to: the first rows as the model will see them, pairs as pairs, in batches by length."""
    lengths = rows["length"][:_FITTED_ROWS]
    count = max(1, sum(total <= _FITTED_TOKENS for total in itertools.accumulate(lengths)))
    order = sorted(range(count), key=lengths.__getitem__)
    wanted = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in rows.column_names]
    chosen, collate = rows.select_columns(wanted).select(order), PaddingCollator(tokenizer)
    parts = (range(start, min(start + _FITTED_BATCH, count)) for start in range(0, count, _FITTED_BATCH))
    return [dict(collate([chosen[index] for index in part])) for part in parts]
