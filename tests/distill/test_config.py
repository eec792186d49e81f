"""DistillConfig: the paper's settings, files, and what makes no run."""

from __future__ import annotations

from typing import Any

import pytest

from kron_kernels.distill.config import DistillConfig, paper_settings

TASK = {"stage": "task", "teacher": "t", "preset": "K8", "task": "sst2", "data": "d"}


def test_settings_are_the_papers() -> None:
    for arguments, wanted in [
        (("pretrain", "K8", None), (3.0, 64, 512, 1e-3)),
        (("task", "K8", "CoLA"), (20.0, 32, 128, 5e-5)),
        (("task", "K21", "squad_v2"), (5.0, 64, 384, 1e-4)),
        (("finetune", None, "sst2"), (3.0, 32, 128, 5e-5)),
    ]:
        found = paper_settings(*arguments)
        assert (found["epochs"], found["batch_size"], found["max_length"], found["learning_rate"]) == wanted
    config = DistillConfig.from_dict({**TASK, "epochs": 1.5}).resolved()
    assert (config.epochs, config.learning_rate, config.dropout) == (1.5, 1e-4, 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": None}, "teacher: expected a model in stage task, got none"),
        ({"stage": "pretrain"}, "task: expected none in stage pretrain, got 'sst2'"),
        ({"learning_rat": 1}, "config: unknown keys learning_rat; expected some of batch_size"),
    ],
)
def test_what_makes_no_run_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        DistillConfig.from_dict({**TASK, **changed})
    assert message in str(raised.value)
