"""What a capture gathers: the very tensors the modules compute, by every way a BERT may compute them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from kron_kernels.convert.kronify import kronify_
from kron_kernels.distill.hidden_states import Captured, capture, encoder_of
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, bert_layers, fuse_

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.tensor([[5, 9, 2, 30, 7, 11], [8, 3, 40, 1, 0, 0], [4, 0, 0, 0, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def fused() -> nn.Module:
    model = BertModel(BertConfig(**SIZES))
    kronify_(model, "K8")
    return fuse_(model)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: BertModel(BertConfig(**SIZES)),
    "kronified and fused": fused,
    "KronBert with a head": lambda: KronBertForMaskedLM(KronBertConfig(**SIZES)),
}


def plain_record(model: nn.Module, ffn_at: str) -> Captured:
    """The same tensors by hooks on a copy whose layers are transformers' own."""
    plain = {fused: theirs for theirs, fused in bert_layers._FUSED.items()}
    bert: Any = encoder_of(copy.deepcopy(model))
    bert._forward_pre_hooks.clear()
    for module in bert.modules():
        module.__class__ = plain.get(type(module), type(module))
    found: dict[str, list[Tensor]] = {"embedding": [], "queries": [], "keys": [], "ffn": []}

    def keep(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda module, args, output: found[name].append(output))

    keep(bert.embeddings, "embedding")
    for layer in bert.encoder.layer:
        keep(layer.attention.self.query, "queries")
        keep(layer.attention.self.key, "keys")
        keep(layer if ffn_at == "layer" else layer.output.dense, "ffn")
    bert(**INPUTS)
    return Captured(found["embedding"][0], tuple(found["queries"]), tuple(found["keys"]), tuple(found["ffn"]))


def flat(captured: Captured) -> list[Tensor]:
    assert captured.embedding is not None
    return [captured.embedding, *captured.queries, *captured.keys, *captured.ffn]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("training", "ffn_at"), [(False, "layer"), (True, "dense")])
def test_capture_gathers_what_the_modules_compute(kind: str, training: bool, ffn_at: str) -> None:
    model = MODELS[kind]().train(training)
    with capture(model, ffn_at=ffn_at) as tape, torch.set_grad_enabled(training):
        model(**INPUTS)
        captured = tape.take()
    expected = plain_record(model, ffn_at)
    for one, right in zip(flat(captured), flat(expected), strict=True):
        assert one.shape == (3, 6, 48)  # padding included, in inference too
        assert one.requires_grad == training
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_gives_the_same_without_reentrance_and_is_an_error_with_it() -> None:
    model: Any = MODELS["KronBert with a head"]().train()

    def run() -> list[Tensor]:
        with capture(model) as tape:
            model(**INPUTS)
            loss = sum(each.square().sum() for each in flat(tape.take()))
            found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        return [each for each in found if each is not None]

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, right in zip(run(), expected, strict=True):
        torch.testing.assert_close(one, right)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with capture(model), pytest.raises(RuntimeError, match="gradient checkpointing: expected use_reentrant=False"):
        model(**INPUTS)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a BertModel .*, got Linear with 0"), capture(nn.Linear(2, 2)):
        pass
