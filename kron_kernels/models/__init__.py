"""Kronecker-factored model families for transformers. Importing this registers them with its Auto classes.

``vit`` and ``gpt2_permute`` are modules of their own, which nothing here imports.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
)

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
from .gpt2 import KronGPT2Config, KronGPT2LMHeadModel, KronGPT2Model
from .inference import optimize_for_inference

# A new family: its configuration and tokenizer, and for each Auto class its model.
REGISTRY: dict[Any, tuple[Any, dict[Any, Any]]] = {
    KronBertConfig: (
        BertTokenizer,
        {
            AutoModel: KronBertModel,
            AutoModelForMaskedLM: KronBertForMaskedLM,
            AutoModelForPreTraining: KronBertForPreTraining,
            AutoModelForQuestionAnswering: KronBertForQuestionAnswering,
            AutoModelForSequenceClassification: KronBertForSequenceClassification,
        },
    ),
    KronGPT2Config: (GPT2Tokenizer, {AutoModel: KronGPT2Model, AutoModelForCausalLM: KronGPT2LMHeadModel}),
}
for _config, (_tokenizer, _models) in REGISTRY.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoTokenizer.register(_config, _tokenizer, exist_ok=True)
    for _auto, _model in _models.items():
        _auto.register(_config, _model, exist_ok=True)

__all__ = [
    "REGISTRY",
    "CapturedModel",
    "KronBertConfig",
    "KronBertForMaskedLM",
    "KronBertForPreTraining",
    "KronBertForQuestionAnswering",
    "KronBertForSequenceClassification",
    "KronBertModel",
    "KronBertPreTrainedModel",
    "KronGPT2Config",
    "KronGPT2LMHeadModel",
    "KronGPT2Model",
    "capture",
    "fuse_",
    "optimize_for_inference",
]
