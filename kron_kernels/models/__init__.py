"""Kronecker-factored model families for transformers. Importing this registers them with its Auto classes."""

from .bert import (
    KronBertConfig,
    KronBertForMaskedLM,
    KronBertForPreTraining,
    KronBertForQuestionAnswering,
    KronBertForSequenceClassification,
    KronBertModel,
    KronBertPreTrainedModel,
)
from .bert_layers import fuse_
from .cuda_graph import CapturedModel, capture
from .inference import optimize_for_inference

__all__ = [
    "CapturedModel",
    "KronBertConfig",
    "KronBertForMaskedLM",
    "KronBertForPreTraining",
    "KronBertForQuestionAnswering",
    "KronBertForSequenceClassification",
    "KronBertModel",
    "KronBertPreTrainedModel",
    "capture",
    "fuse_",
    "optimize_for_inference",
]
