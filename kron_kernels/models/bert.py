"""KronBert: BERT with Kronecker-factored attention, feed-forward and word embedding (Tahaei et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertEmbeddings

from ..convert.calibrate import Calibration, Progress
from ..convert.kronify import ConversionReport, init_factored_, kronified_copy, kronify_
from ..convert.presets import KronConfig, as_kron_config, preset
from ..convert.rules import BandRule
from ..convert.ties import tie_decoders_
from ..nn import AdaptiveEmbedding, KronDecoder, KronEmbedding, TiedDecoder, is_quantized
from .bert_layers import FusedBertEmbeddings, FusedBertLayer, fuse_
from .checkpoint import check_loaded, is_damage
from .cuda_graph import CapturedModel, capture

_WORD_WEIGHT = "bert.embeddings.word_embeddings.weight"


@strict
class KronBertConfig(BertConfig):
    """A BertConfig with ``kron``: a KronConfig, its dict or a preset's name. It is kept as the dict.

    ``padding_free`` lets batches with padding be computed on their real tokens alone, where that is faster; padding
    positions of the last hidden state are zero then (docs/inference.md).
    ``add_pooling_layer`` says whether an encoder by itself has a pooler; mean pooling does without.
    Raises ValueError for an unknown preset, one that does not divide the model's sizes, and any other dict; TypeError
    for anything else.
    """

    model_type = "kron_bert"

    kron: Any = "K8"
    padding_free: bool = True
    add_pooling_layer: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.kron, str):
            self.kron = preset(self.kron, self.hidden_size, self.intermediate_size)
        self.kron = as_kron_config(self.kron).to_dict()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dense(cls, config: BertConfig, kron: KronConfig | Mapping[str, Any] | str) -> KronBertConfig:
        """The configuration of a BERT compressed by ``kron``."""
        fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        return cls(**{**fields, "kron": kron})


class KronBertPreTrainedModel(BertPreTrainedModel):
    """What all KronBert classes share: construction without dense weights, initialisation, loading, resizing."""

    config: KronBertConfig
    config_class = KronBertConfig
    _no_split_modules = [FusedBertEmbeddings.__name__, FusedBertLayer.__name__]  # noqa: RUF012 (transformers' way)
    bert: Any  # the encoder of a model with a head
    conversion_report: ConversionReport

    def __init__(self, config: KronBertConfig, *args: Any, **kwargs: Any) -> None:
        device = torch.get_default_device()
        checkpointing = getattr(config, "gradient_checkpointing", False)  # transformers deletes it at the first module
        # BERT's constructors make the dense layers that are replaced here: on the meta device they take no memory.
        with torch.device("meta"):
            super().__init__(config, *args, **kwargs)
            if isinstance(self, BertModel):
                kronify_(self, config.kron, fit=False)
                fuse_(self)
            else:
                self.bert = KronBertModel(config, add_pooling_layer=self.bert.pooler is not None)
                # Declared ties: transformers makes the actual ones only after loading.
                ties = self.all_tied_weights_keys.items()
                decoders = [layer.removesuffix(".weight") for layer, source in ties if source == _WORD_WEIGHT]
                tie_decoders_(self, decoders, self.bert.get_input_embeddings())
        if device.type != "meta":
            self.to_empty(device=device)
            self._reset_buffers()
            self.post_init()
        if checkpointing:
            self.gradient_checkpointing_enable()

    def _reset_buffers(self) -> None:
        # Not left to _init_weights, which transformers' no_init_weights turns off.
        for module in self.modules():
            if isinstance(module, BertEmbeddings):
                length = module.position_ids.shape[-1]
                module.position_ids.data.copy_(torch.arange(length).expand(1, -1))
                module.token_type_ids.data.zero_()
            if isinstance(module, AdaptiveEmbedding):
                module.reset_places()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers does not come here with loaded modules, and guards torch's init functions for single parameters.
        if not init_factored_(module, self.config.initializer_range):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as transformers does; OSError for a checkpoint that is damaged, of other shapes or incomplete.

        ``ignore_mismatched_sizes=True`` initialises tensors of other shapes instead.
        """
        path, ignore_mismatched = pretrained_model_name_or_path, kwargs.pop("ignore_mismatched_sizes", False)
        try:
            loaded: Any = super().from_pretrained(
                path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            if not is_damage(error):
                raise
            raise OSError(f"{path}: damaged checkpoint: {str(error) or type(error).__name__}") from error
        model, info = loaded
        check_loaded(model, path, info, ignore_mismatched)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_dense(
        cls,
        dense: BertPreTrainedModel,
        kron: KronConfig | Mapping[str, Any] | str = "K8",
        *,
        calibration: Calibration | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """The KronBert model nearest to ``dense``, a model of the BERT class that ``cls`` derives from.

        Biases, LayerNorms, positions, pooler and head are copied; ``dense`` stays as it is. ``calibration`` and
        ``progress`` are those of ``kronify_``, whose report the model keeps as ``conversion_report``.
        Raises TypeError for another class of model, and what ``kronify_`` raises.
        """
        expected = next(
            base
            for base in cls.__mro__
            if issubclass(base, BertPreTrainedModel) and not issubclass(base, KronBertPreTrainedModel)
        )
        if not isinstance(dense, expected):
            raise TypeError(f"dense: expected {expected.__name__}, got {type(dense).__name__}")
        shadow, report = kronified_copy(dense, kron, calibration=calibration, progress=progress)
        model = cls._from_config(
            KronBertConfig.from_dense(dense.config, report.config),
            dtype=dense.dtype,
            attn_implementation=dense.config._attn_implementation,
            **({"add_pooling_layer": dense.pooler is not None} if isinstance(dense, BertModel) else {}),
        )
        model.load_state_dict(shadow.state_dict())
        model.conversion_report = report
        return model.to(dense.device).train(dense.training)

    def capture(self, batch: int, length: int, *, padded: bool = False) -> CapturedModel:
        """The forward as one CUDA graph for ``(batch, length)`` token ids: ``models.capture`` of this model."""
        return capture(self, batch, length, padded=padded)

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Resize the vocabulary: rows of A are kept, cut off or added, and an output layer follows.

        Added tokens get the mean of the rows of A (``mean_resizing``) or rows drawn as at initialisation, in an
        adaptive embedding the mean of the last band; and an output bias of zero. ``pad_to_multiple_of`` rounds the size
        up. Returns the word embedding.
        """
        old: Any = self.get_input_embeddings()
        if is_quantized(old):
            raise ValueError("model: expected factors in floating point to resize, got integers; resize first")
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == old.num_embeddings:
            return old
        if isinstance(old, AdaptiveEmbedding):
            new: Any = old.resized(size)
            bands = [*new.bands[:-1], (None, new.bands[-1][1])]
            config = as_kron_config(self.config.kron)
            # In place of a rule of its own too: there is one word embedding.
            layers = {name: rule for name, rule in config.layers.items() if not name.endswith("word_embeddings")}
            rules = {**config.rules, "embedding": BandRule(tuple(bands))}
            self.config.kron = replace(config, rules=rules, layers=layers).to_dict()
        else:
            new = self._resized_kron(old, size, mean_resizing)
        output: Any = self.get_output_embeddings()
        self.set_input_embeddings(new)
        if isinstance(output, (KronDecoder, TiedDecoder)):
            old_bias: Any = output.bias
            bias = old_bias.new_zeros(size)
            kept = min(size, old.num_embeddings)
            bias[:kept] = old_bias[:kept]
            self.set_output_embeddings(new.tied_decoder(nn.Parameter(bias, old_bias.requires_grad)))
        elif output is not None:
            self.set_output_embeddings(self._get_resized_lm_head(output, size, mean_resizing=mean_resizing))
        self.config.vocab_size = size
        return new

    def _resized_kron(self, old: KronEmbedding, size: int, mean_resizing: bool) -> KronEmbedding:
        factory: dict[str, Any] = {"device": old.a.device, "dtype": old.a.dtype}
        new = KronEmbedding(size, old.embedding_dim, old.b.shape[2], old.terms, old.padding_idx, **factory)
        new.reset_parameters(self.config.initializer_range)
        kept = min(size, old.num_embeddings)
        if mean_resizing:
            new.a[:, kept:] = old.a.mean(1, keepdim=True)
        new.a[:, :kept] = old.a[:, :kept]
        new.b.copy_(old.b)
        return new.requires_grad_(old.a.requires_grad)


class KronBertModel(KronBertPreTrainedModel, BertModel):
    """BertModel with factored layers: the encoder, with a dense pooler unless told or configured to do without."""

    def __init__(self, config: KronBertConfig, add_pooling_layer: bool | None = None) -> None:
        if add_pooling_layer is not None:
            config.add_pooling_layer = add_pooling_layer
        super().__init__(config, add_pooling_layer=config.add_pooling_layer)


class KronBertForMaskedLM(KronBertPreTrainedModel, BertForMaskedLM):
    """BertForMaskedLM on KronBert; the output layer is tied to the word embedding's factors."""


class KronBertForPreTraining(KronBertPreTrainedModel, BertForPreTraining):
    """BertForPreTraining (masked LM and next sentence) on KronBert; the output layer is tied as in masked LM."""


class KronBertForSequenceClassification(KronBertPreTrainedModel, BertForSequenceClassification):
    """BertForSequenceClassification on KronBert, with a dense pooler and classifier."""


class KronBertForQuestionAnswering(KronBertPreTrainedModel, BertForQuestionAnswering):
    """BertForQuestionAnswering on KronBert, with a dense span classifier."""
