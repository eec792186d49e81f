"""What a run came to: the contents of its result.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

VERSION = 1
KINDS = ("finetune", "pretrain", "task")


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to.

    Attributes:
        kind: "finetune" (a dense model on a task), "pretrain" (stage 1) or "task" (stage 2).
        name: of the model: "teacher", "K8", ...
        variant: what sets the run apart from the usual one, such as "no stage 1"; "" for the usual one.
        task: "sst2", "mrpc", ...; of stage 1 the name of its text.
        seed: of the run.
        metrics: metric -> value on the development set.
        score: the task's main metric in percent; None where there is none, as in stage 1.
        teacher_score: the same of the run's teacher; None without a teacher or its score.
        parameters: of the model.
        teacher_parameters: of the teacher; None without one.
        steps: updates of the weights.
        seconds: of training.
        peak_memory_bytes: largest memory in use, over all starts of the run; None where it was not measured.
        train_tokens: tokens seen in training, padding left out; None where they were not counted.
    """

    kind: str
    name: str
    task: str
    seed: int
    parameters: int
    steps: int
    seconds: float
    variant: str = ""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    score: float | None = None
    teacher_score: float | None = None
    teacher_parameters: int | None = None
    peak_memory_bytes: int | None = None
    train_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def label(self) -> str:
        """Name and variant, as tables and plots show them."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with a ``version``."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> RunResult:
        """What ``to_dict`` gave; ValueError for another version and for fields that lack, are unknown or mistyped."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else data
            raise ValueError(f"version: expected a run's result of version {VERSION}, got {version!r}")
        values = {name: value for name, value in data.items() if name != "version"}
        required = {each.name for each in dataclasses.fields(cls) if _is_required(each)}
        known = get_type_hints(cls)
        if lacking := sorted(required - values.keys()):
            raise ValueError(f"{lacking[0]}: expected a value, got nothing")
        if unknown := sorted(values.keys() - known.keys()):
            raise ValueError(f"{unknown[0]}: expected one of the fields {', '.join(known)}")
        for name, value in values.items():
            allowed = (Mapping,) if name == "metrics" else get_args(known[name]) or (known[name],)
            allowed = (*allowed, int) if float in allowed else allowed
            if not isinstance(value, allowed) or isinstance(value, bool):
                wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
                raise ValueError(f"{name}: expected {wanted}, got {value!r}")
        return cls(**values)


def _is_required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
