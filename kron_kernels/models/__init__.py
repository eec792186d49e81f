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

__all__ = [
    "KronBertConfig",
    "KronBertForMaskedLM",
    "KronBertForPreTraining",
    "KronBertForQuestionAnswering",
    "KronBertForSequenceClassification",
    "KronBertModel",
    "KronBertPreTrainedModel",
    "fuse_",
]
