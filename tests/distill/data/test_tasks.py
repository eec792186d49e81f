"""The table of tasks: names, scores, and what a user's own task is made of."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("datasets", reason="the extra 'distill' is not installed")
pytest.importorskip("torchmetrics", reason="the extra 'distill' is not installed")

from kron_kernels.distill.data import TASKS, custom_task, get_task, task_from


def test_names_and_scores_of_tasks() -> None:
    assert get_task("SST-2") is get_task("sst2")
    assert [get_task(name).name for name in ("STS_B", "squad-v1.1", "SQuAD v2.0")] == ["stsb", "squad", "squad_v2"]
    with pytest.raises(ValueError, match=r"task: expected one of sst2, cola, .*, or custom, got 'sst3'"):
        get_task("sst3")
    mains = {"cola": "matthews", "stsb": "spearman", "squad": "f1", "squad_v2": "f1"}
    assert {name: get_task(name).main for name in TASKS} == {name: mains.get(name, "accuracy") for name in TASKS}
    assert [get_task(name).num_labels for name in ("sst2", "mnli", "stsb", "squad")] == [2, 3, 1, 2]


def test_tasks_of_ones_own() -> None:
    assert task_from("custom", {"text": "a", "label": "y"}) == custom_task("a", label="y")
    assert custom_task("a", "b").pair
    assert (custom_task().main, custom_task(regression=True).main) == ("accuracy", "spearman")
    with pytest.raises(ValueError, match="task: expected custom along with flags of its columns, got sst2"):
        task_from("sst2", {"text": "a"})
    with pytest.raises(ValueError, match="metrics: expected some of accuracy, f1, matthews for classification, got 'p"):
        dataclasses.replace(custom_task(), metrics=("pearson",))
