"""DistillConfig: the paper's settings, files, and what makes no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kron_kernels.distill.config import DistillConfig, paper_settings, read_config

TASK = {"stage": "task", "teacher": "t", "preset": "K8", "task": "sst2", "data": "d"}


@pytest.mark.parametrize(
    ("stage", "preset", "task", "wanted"),
    [
        ("pretrain", "K8", None, (3.0, 64, 512, 1e-3)),
        ("task", "K8", "sst2", (10.0, 32, 128, 1e-4)),
        ("task", "K8", "CoLA", (20.0, 32, 128, 5e-5)),
        ("task", "K8", "rte", (10.0, 32, 128, 1e-5)),
        ("task", "K21", "mrpc", (10.0, 32, 128, 5e-4)),
        ("task", "K21", "QQP", (10.0, 32, 128, 1e-4)),
        ("task", "K21", "rte", (10.0, 32, 128, 5e-5)),
        ("task", "K21", "squad_v2", (5.0, 64, 384, 1e-4)),
        ("finetune", None, "sst2", (3.0, 32, 128, 5e-5)),
    ],
)
def test_settings_are_the_papers(stage: str, preset: str | None, task: str | None, wanted: tuple[float, ...]) -> None:
    found = paper_settings(stage, preset, task)
    assert (found["epochs"], found["batch_size"], found["max_length"], found["learning_rate"]) == wanted


def test_numbers_given_stay_and_the_others_are_filled_in() -> None:
    config = DistillConfig.from_dict({**TASK, "epochs": 1.5}).resolved()
    assert (config.epochs, config.learning_rate, config.dropout) == (1.5, 1e-4, 0.0)
    loaded = DistillConfig.from_dict({**TASK, "preset": None, "student": "s"})
    assert loaded.resolved("K21").learning_rate == 5e-4
    finetune = DistillConfig(stage="finetune", student="s", task="sst2", data="d").resolved()
    assert finetune.dropout is None


def test_yaml_and_dict_are_read_back(tmp_path: Path) -> None:
    import yaml

    config = DistillConfig.from_dict({**TASK, "losses": {"attention": "kl", "scores": 0.5}, "trainer": {"fsdp": "x"}})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    assert DistillConfig.from_dict(read_config(path)) == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stage": "tune"}, "stage: expected one of finetune, pretrain, task, got 'tune'"),
        ({"stage": None}, "stage: expected a value, got none"),
        ({"data": None}, "data: expected a value, got none"),
        ({"teacher": None}, "teacher: expected a model in stage task, got none"),
        ({"student": "s"}, "student: expected either a folder or a preset"),
        ({"preset": None}, "student: expected either a folder or a preset"),
        ({"preset": None, "student": "s", "warm_start": "plain"}, "warm_start: expected a preset with it"),
        ({"task": None}, "task: expected the name of a task, or custom"),
        ({"stage": "pretrain"}, "task: expected none in stage pretrain, got 'sst2'"),
        ({"stage": "finetune"}, "student: expected the model to fine-tune, without teacher and preset"),
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number above 0, got -1.0"),
        ({"save_steps": 0}, "save_steps: expected at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected a share from 0 to below 1, got 1.0"),
        ({"losses": {"attention": "l1"}}, "attention: expected 'mse' or 'kl', got 'l1'"),
        ({"learning_rat": 1}, "config: unknown keys learning_rat; expected some of batch_size"),
    ],
)
def test_what_makes_no_run_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        DistillConfig.from_dict({**TASK, **changed})
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config: .*run\.yaml"):
        read_config(path)
