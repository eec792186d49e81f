"""Data of both stages of distillation: tasks and their files, pre-training text, question answering, metrics.

Needs the libraries of the extra ``distill`` (datasets, torchmetrics).
"""

from .files import encode, load_task, resolved
from .metrics import compute_metrics
from .squad import best_answers, qa_features, squad_scores
from .tasks import TASKS, Task, custom_task, get_task, task_from
from .text import MaskingCollator, PaddingCollator, load_text, pack

__all__ = [
    "TASKS",
    "MaskingCollator",
    "PaddingCollator",
    "Task",
    "best_answers",
    "compute_metrics",
    "custom_task",
    "encode",
    "get_task",
    "load_task",
    "load_text",
    "pack",
    "qa_features",
    "resolved",
    "squad_scores",
    "task_from",
]
