"""KronGPT2: transformers' GPT-2 with Kronecker-factored layers, saved and loaded like any other model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from ..convert.calibrate import Calibration, Progress
from ..convert.kronify import ConversionReport, init_factored_, kronified_copy, kronify_
from ..convert.layers import EMBEDDINGS, FACTORED
from ..convert.presets import KronConfig, as_kron_config, preset
from ..convert.ties import tie_decoders_


@strict
class KronGPT2Config(GPT2Config):
    """A GPT2Config with ``kron``: a KronConfig, its dict or a preset's name. It is kept as the dict.

    Raises ValueError for an unknown preset, one that does not divide the model's sizes, and any other dict.
    """

    model_type = "kron_gpt2"

    kron: Any = "KnGPT2"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.kron, str):
            self.kron = preset(self.kron, self.n_embd, self.n_inner or 4 * self.n_embd)
        self.kron = as_kron_config(self.kron).to_dict()
        super().__post_init__(**kwargs)


class KronGPT2PreTrainedModel(GPT2PreTrainedModel):
    """What the KronGPT2 classes share: construction without dense weights, and initialisation."""

    config: KronGPT2Config
    config_class = KronGPT2Config
    transformer: Any  # of a model with a head

    def __init__(self, config: KronGPT2Config, *args: Any, **kwargs: Any) -> None:
        device = torch.get_default_device()
        # The dense layers that are replaced here take no memory on the meta device.
        with torch.device("meta"):
            super().__init__(config, *args, **kwargs)
            if isinstance(self, GPT2Model):
                kronify_(self, config.kron, fit=False)
            else:
                self.transformer = KronGPT2Model(config)
                # Declared ties: transformers makes the actual ones only after loading.
                decoders = ["lm_head"] if "lm_head.weight" in self.all_tied_weights_keys else []
                embedding = self.transformer.get_input_embeddings()
                if isinstance(embedding, EMBEDDINGS):
                    tie_decoders_(self, decoders, embedding)
        if device.type != "meta":
            self.to_empty(device=device)
            self.post_init()
            self._narrow_projections()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers does not come here with loaded modules, and guards torch's init functions for single parameters.
        if not init_factored_(module, self.config.initializer_range):
            super()._init_weights(module)

    @torch.no_grad()
    def _narrow_projections(self) -> None:
        """Draw what each half of a block adds to the residual stream with the smaller deviation of GPT-2's paper.

        transformers does so in ``_init_weights`` of the halves, but leaves out modules without parameters of their own
        in classes that are not its own.
        """
        std = self.config.initializer_range / (2 * self.config.n_layer) ** 0.5
        for module in self.modules():
            projection = module.c_proj if isinstance(module, (GPT2Attention, GPT2MLP)) else None
            if projection is not None and not init_factored_(projection, std):
                nn.init.normal_(projection.weight, std=std)


class KronGPT2Model(KronGPT2PreTrainedModel, GPT2Model):
    """GPT2Model whose layers and word embedding are those of ``config.kron``."""


class KronGPT2LMHeadModel(KronGPT2PreTrainedModel, GPT2LMHeadModel):
    """GPT2LMHeadModel whose layers and tied head are those of ``config.kron``.

    ``from_dense`` converts; ``save_pretrained`` and ``from_pretrained``, this class's or AutoModelForCausalLM's, write
    and read it; ``generate`` with its cache is transformers' own.
    """

    conversion_report: ConversionReport

    @classmethod
    def from_dense(
        cls,
        dense: GPT2LMHeadModel,
        kron: KronConfig | Mapping[str, Any] | str = "KnGPT2",
        *,
        calibration: Calibration | None = None,
        progress: Progress | None = None,
    ) -> KronGPT2LMHeadModel:
        """The KronGPT2 nearest to ``dense``, which stays as it is; its report is ``conversion_report``.

        ``calibration`` and ``progress`` are those of ``kronify_``. Raises TypeError for another class of
        model, and what ``kronify_`` raises.
        """
        if not isinstance(dense, GPT2LMHeadModel):
            raise TypeError(f"dense: expected GPT2LMHeadModel, got {type(dense).__name__}")
        shadow, report = kronified_copy(dense, kron, calibration=calibration, progress=progress)
        config = KronGPT2Config(**_fields(dense.config), kron=report.config)
        model = cls._from_config(config, dtype=dense.dtype, attn_implementation=dense.config._attn_implementation)
        model.load_state_dict(shadow.state_dict())
        model.generation_config = copy.deepcopy(dense.generation_config)
        model.conversion_report = report
        return model.to(dense.device).train(dense.training)


def _fields(config: GPT2Config) -> dict[str, Any]:
    """What a dense and a converted configuration have in common."""
    own = ("model_type", "architectures", "kron")
    return {key: value for key, value in config.to_dict().items() if key not in own}


@torch.no_grad()
def reconstruct_dense(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The dense GPT-2 that computes what a converted one does, each weight built from its factors; for comparison.

    ``model`` is a KronGPT2LMHeadModel or a GPT2LMHeadModel after ``kronify_``. Raises TypeError for anything else.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise TypeError(f"model: expected GPT2LMHeadModel, got {type(model).__name__}")
    dense = GPT2LMHeadModel._from_config(
        GPT2Config(**_fields(model.config)), dtype=model.dtype, attn_implementation=model.config._attn_implementation
    ).to(model.device)
    plain = dense.state_dict().keys()
    state = {key: value for key, value in model.state_dict().items() if key in plain}
    for name, module in model.named_modules():
        if isinstance(module, FACTORED):
            weight = module.dense_weight()
            state[f"{name}.weight"] = weight if isinstance(module, EMBEDDINGS) else weight.T
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    dense.load_state_dict(state)
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.train(model.training)
