"""What one run does: a flat configuration, read from YAML or flags, with the paper's settings as defaults."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .losses import LossConfig

STAGES = ("finetune", "pretrain", "task")
PRECISIONS = ("fp32", "bf16", "fp16")


def paper_settings(stage: str, preset: str | None = None, task: str | None = None) -> dict[str, Any]:
    """Epochs, batch size, sequence length and learning rate of KroneckerBERT (Tahaei et al., sections 4.1 and 4.2).

    Stage 1 ("pretrain"): 3 epochs of batches of 64 sequences of 512 tokens at 1e-3. Stage 2 ("task"): batches of 32
    sequences of 128 tokens; K8 1e-4 (CoLA 5e-5, RTE 1e-5), K21 and K19 5e-4 (QQP 1e-4, RTE 5e-5); 10 epochs of their 5
    to 15, 20 for CoLA; SQuAD batches of 64 of 384 tokens at 1e-4, 5 epochs. "finetune" trains a dense model in the
    usual way for BERT: 3 epochs at 5e-5.
    """
    if stage == "pretrain":
        return {"epochs": 3.0, "batch_size": 64, "max_length": 512, "learning_rate": 1e-3}
    task = (task or "").lower().replace("-", "")
    if task.startswith("squad"):
        settings = {"epochs": 5.0, "batch_size": 64, "max_length": 384, "learning_rate": 1e-4}
    else:
        settings = {"epochs": 20.0 if task == "cola" else 10.0, "batch_size": 32, "max_length": 128}
        if preset == "K8":
            settings["learning_rate"] = {"cola": 5e-5, "rte": 1e-5}.get(task, 1e-4)
        else:
            settings["learning_rate"] = {"qqp": 1e-4, "rte": 5e-5}.get(task, 5e-4)
    return {**settings, "epochs": 3.0, "learning_rate": 5e-5} if stage == "finetune" else settings


@dataclass(frozen=True)
class DistillConfig:
    """One run. ``stage`` says which:

    - "finetune": train ``student``, a dense or Kronecker BERT, on a task without a teacher;
    - "pretrain": stage 1, distil ``teacher`` into the student on unlabelled ``data``;
    - "task": stage 2, distil a fine-tuned ``teacher`` into the student on a task.

    The student comes from a folder (``student``) or is made from the teacher by ``preset``. Numbers left at None are
    ``paper_settings``. ``trainer`` takes any further argument of transformers.TrainingArguments by its name.
    Raises ValueError for a combination that makes no run; the message names the field.
    """

    stage: str
    data: str | Sequence[str]  # folder or hub name of a task; text files, folders or hub names of stage 1
    teacher: str | None = None
    student: str | None = None
    preset: str | None = None
    warm_start: str | None = None  # of a student made here; None: the best there is
    task: str | None = None
    text: str | None = None  # columns of the task "custom"; that of the text in the tables of stage 1
    text_pair: str | None = None
    label: str | None = None
    regression: bool = False  # of the task "custom": labels are numbers
    name: str = ""  # in reports: of the model (default: the preset) and of what is special about this run
    variant: str = ""
    epochs: float | None = None
    max_steps: int = -1
    batch_size: int | None = None  # sequences a step and process
    gradient_accumulation: int = 1
    max_length: int | None = None
    learning_rate: float | None = None
    warmup_steps: float = 0.06  # of all steps where below 1
    weight_decay: float = 0.0
    dropout: float | None = None  # of the student; None: 0 with a teacher, what the model has without
    next_sentence: bool = False
    train_limit: int | None = None  # examples or packed sequences to train on at most
    precision: str = "fp32"  # of the student
    teacher_precision: str | None = None  # None: the student's
    seed: int = 0
    eval_steps: int = 0  # 0: after the last step only
    save_steps: int = 500
    logging_steps: int = 25
    losses: LossConfig = field(default_factory=LossConfig)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {self.stage!r}")
        if not isinstance(self.losses, LossConfig):
            object.__setattr__(self, "losses", _losses(self.losses))
        self._check_models()
        if self.stage != "pretrain" and self.task is None:
            raise ValueError("task: expected the name of a task, or custom for one of your own, got none")
        if self.stage == "pretrain" and self.task is not None:
            raise ValueError(f"task: expected none in stage pretrain, got {self.task!r}")
        choices = {"precision": PRECISIONS, "teacher_precision": (None, *PRECISIONS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "max_length", "learning_rate", "train_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        for name in ("gradient_accumulation", "save_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share from 0 to below 1, got {self.dropout!r}")

    def _check_models(self) -> None:
        if self.stage == "finetune":
            if self.student is None or self.teacher is not None or self.preset is not None:
                raise ValueError("student: expected the model to fine-tune, without teacher and preset")
            return
        if self.teacher is None:
            raise ValueError(f"teacher: expected a model in stage {self.stage}, got none")
        if (self.student is None) == (self.preset is None):
            raise ValueError(
                f"student: expected either a folder or a preset, got student={self.student!r}, preset={self.preset!r}"
            )
        if self.warm_start is not None and self.preset is None:
            raise ValueError(f"warm_start: expected a preset with it, got {self.warm_start!r} and a student")

    def resolved(self, preset: str | None = None, positions: int | None = None) -> DistillConfig:
        """This configuration with ``paper_settings`` in place of every None.

        ``preset`` names a loaded student's; ``positions`` are those of the models, the most that ``max_length`` may be.
        """
        settings = paper_settings(self.stage, self.preset or preset, self.task)
        if positions is not None:
            if self.max_length is not None and self.max_length > positions:
                raise ValueError(f"max_length: expected at most the model's {positions}, got {self.max_length}")
            settings["max_length"] = min(settings["max_length"], positions)
        missing = {name: value for name, value in settings.items() if getattr(self, name) is None}
        if self.dropout is None and self.stage != "finetune":
            missing["dropout"] = 0.0
        return dataclasses.replace(self, **missing)

    def to_dict(self) -> dict[str, Any]:
        """A dict that YAML and JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """The inverse of ``to_dict``; ValueError for unknown and missing keys."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: unknown keys {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        if missing := [name for name in ("stage", "data") if values.get(name) is None]:
            raise ValueError(f"{missing[0]}: expected a value, got none")
        return cls(**values)


def _losses(values: Any) -> LossConfig:
    if not isinstance(values, Mapping):
        raise ValueError(f"losses: expected a mapping of weights and forms, got {values!r}")
    known = {entry.name for entry in dataclasses.fields(LossConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"losses: unknown keys {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    return LossConfig(**values)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError for YAML that is broken or holds something else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"config: expected a mapping of settings, got {path} with {type(values).__name__}")
    return dict(values)
