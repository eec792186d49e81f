"""Two-stage distillation of a dense BERT into a KronBert by its intermediate layers (Tahaei et al., 2021).

Needs the libraries of the extra ``distill``.
"""

from .config import DistillConfig, paper_settings
from .evaluate import EvaluationResult, evaluate
from .hidden_states import Captured, capture
from .losses import LossConfig, Normalizers, check_pair, distillation_losses
from .run import run_stage
from .run_folder import RunFolder, RunResult
from .trainer import DistillTrainer, TeacherOutputs

__all__ = [
    "Captured",
    "DistillConfig",
    "DistillTrainer",
    "EvaluationResult",
    "LossConfig",
    "Normalizers",
    "RunFolder",
    "RunResult",
    "TeacherOutputs",
    "capture",
    "check_pair",
    "distillation_losses",
    "evaluate",
    "paper_settings",
    "run_stage",
]
