"""Which runs make the table of distilled models: teachers, both stages and the ablations, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kron_kernels.distill.config import paper_settings

# GLUE's folders by the names of the tasks.
FOLDERS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA", "rte": "RTE"}
# Passes over the training data: of a teacher, and of a student in stage 2 (the paper: 5 to 15, CoLA 15 to 30).
EPOCHS = {"sst2": (1, 2), "mrpc": (5, 4), "stsb": (4, 5), "cola": (4, 6), "rte": (4, 5)}
# Of the one large training set, the examples to train on.
LIMITS = {"sst2": 24_000}
# Of stage 2: the highest of the paper's choices, for all presets, because so little text comes before it.
LEARNING_RATE = 5e-4
# The small tasks, on which the ablations are run.
ABLATED = ("mrpc", "stsb", "cola")


@dataclass(frozen=True)
class Job:
    """One run: its folder's name, its configuration, and the jobs whose models it starts from."""

    name: str
    settings: dict[str, Any]
    needs: dict[str, str] = field(default_factory=dict)  # setting -> job

    def config(self, out: Path) -> dict[str, Any]:
        """The configuration with the folders of the models that it needs."""
        return {**self.settings, **{key: str(out / job / "model") for key, job in self.needs.items()}}


@dataclass(frozen=True)
class Sources:
    """Where models and data are. Stage 1 takes the first text; with more, a longer one goes on with the others."""

    model: str
    glue: Path
    text: Sequence[str]


def plan(sources: Sources, presets: Sequence[str], tasks: Sequence[str], scale: float, seeds: int) -> Iterator[Job]:
    """All jobs, what matters most first. ``scale`` stretches the passes over the data, 1 is for two CPU cores."""
    for task in tasks:
        yield _teacher(sources, task, scale)
    for preset in presets:
        yield _stage_1(sources, preset, scale)
        for task in tasks:
            yield _stage_2(sources, preset, task, scale, student=f"stage1-{preset}")
    ablated = [task for task in tasks if task in ABLATED]
    longer = len(sources.text) > 1
    for preset in presets[:2]:
        if longer:
            yield _stage_1(sources, preset, scale, start=f"stage1-{preset}")
        for task in ablated:
            if longer:
                student = f"stage1-{preset}-longer"
                yield _stage_2(sources, preset, task, scale, student=student, variant="stage 1 twice as long")
            student, light = f"stage1-{preset}", {"scores": 0.1}
            yield _stage_2(sources, preset, task, scale, student=student, variant="scores weigh 0.1", losses=light)
            yield _stage_2(sources, preset, task, scale, variant="no stage 1", warm_start="blockwise")
            yield _stage_2(sources, preset, task, scale, variant="no stage 1, plain start", warm_start="plain")
            # A start that is already near its teacher is undone by the high rate within a hundred steps.
            gentle = "no stage 1, rate 1e-4"
            yield _stage_2(sources, preset, task, scale, variant=gentle, warm_start="blockwise", learning_rate=1e-4)
            yield _without_teacher(sources, preset, task, scale)
    for seed in range(1, seeds):
        for task in ablated:
            for preset in presets[:2]:
                yield _stage_2(sources, preset, task, scale, student=f"stage1-{preset}", seed=seed)


def _teacher(sources: Sources, task: str, scale: float) -> Job:
    settings = {
        "stage": "finetune",
        "student": sources.model,
        "name": "teacher",
        "precision": "bf16",
        "epochs": EPOCHS[task][0] * scale,
        "learning_rate": 1e-4,
        "batch_size": 32,
    }
    return Job(f"teacher-{task}", settings | _data(sources, task))


def _stage_1(sources: Sources, preset: str, scale: float, start: str | None = None) -> Job:
    """On the first text from the model itself, or on the others from the student of ``start``."""
    settings = {
        "stage": "pretrain",
        "teacher": sources.model,
        "teacher_precision": "bf16",
        "data": list(sources.text[:1] if start is None else sources.text[1:]),
        "epochs": scale,
        "train_limit": 12_000,
        "batch_size": 16,
        "max_length": 128,
        "learning_rate": paper_settings("pretrain")["learning_rate"],
    }
    if start is None:
        # Of the time for a block-wise start, this stage itself makes more.
        return Job(f"stage1-{preset}", settings | {"preset": preset, "warm_start": "data-aware"})
    return Job(f"{start}-longer", settings | {"name": preset, "variant": "longer"}, {"student": start})


def _stage_2(
    sources: Sources,
    preset: str,
    task: str,
    scale: float,
    *,
    student: str | None = None,
    warm_start: str | None = None,
    variant: str = "",
    losses: dict[str, float] | None = None,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> Job:
    settings: dict[str, Any] = {
        "stage": "task",
        "name": preset,
        "variant": variant,
        "teacher_precision": "bf16",
        "epochs": EPOCHS[task][1] * scale,
        "batch_size": 32,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    if losses is not None:
        settings["losses"] = losses
    needs = {"teacher": f"teacher-{task}"}
    if student is None:
        settings |= {"preset": preset, "warm_start": warm_start}
    else:
        needs["student"] = student
    return Job(_named(preset, task, variant, seed), settings | _data(sources, task), needs)


def _without_teacher(sources: Sources, preset: str, task: str, scale: float) -> Job:
    """The student of stage 1 fine-tuned on the labels alone, as long as with a teacher and at the same rate."""
    variant = "no KD in stage 2"
    settings = {
        "stage": "finetune",
        "name": preset,
        "variant": variant,
        "epochs": EPOCHS[task][1] * scale,
        "batch_size": 32,
        "learning_rate": LEARNING_RATE,
    }
    needs = {"student": f"stage1-{preset}"}
    return Job(_named(preset, task, variant, 0), settings | _data(sources, task), needs)


def _data(sources: Sources, task: str) -> dict[str, Any]:
    limit = {"train_limit": LIMITS[task]} if task in LIMITS else {}
    return {"task": task, "data": str(sources.glue / FOLDERS[task]), "max_length": 128, "save_steps": 200, **limit}


def _named(preset: str, task: str, variant: str, seed: int) -> str:
    parts = [preset, task, *variant.replace(",", "").split(), *([f"seed{seed}"] if seed else [])]
    return "-".join(parts)
