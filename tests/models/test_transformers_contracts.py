"""transformers' common contracts for models, on every KronBert class: our own versions of its tests."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from kron_kernels.models import (
    KronBertForMaskedLM,
    KronBertForPreTraining,
    KronBertForQuestionAnswering,
    KronBertForSequenceClassification,
    KronBertModel,
)
from kron_kernels.nn import KronDecoder
from tests.models.bert_cases import IDS, MASK, NO_DROPOUT, make, run

pytestmark = pytest.mark.slow

TIED = (KronBertForMaskedLM, KronBertForPreTraining)
LABELS: dict[Any, dict[str, torch.Tensor]] = {
    KronBertModel: {},
    KronBertForMaskedLM: {"labels": IDS},
    KronBertForPreTraining: {"labels": IDS, "next_sentence_label": torch.tensor([0, 1, 1])},
    KronBertForSequenceClassification: {"labels": torch.tensor([0, 1, 1])},
    KronBertForQuestionAnswering: {
        "start_positions": torch.tensor([0, 1, 1]),
        "end_positions": torch.tensor([1, 2, 2]),
    },
}
every_class = pytest.mark.parametrize("kind", LABELS, ids=lambda kind: kind.__name__)


def loss_of(model: nn.Module, kind: Any) -> torch.Tensor:
    result = model(IDS, attention_mask=MASK, **LABELS[kind])
    return result.pooler_output.square().sum() if kind is KronBertModel else result.loss


@every_class
def test_forward_signature_and_determinism(kind: Any) -> None:
    model = make("K8", kind)
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"
    torch.testing.assert_close(run(model), run(model), rtol=0, atol=0)
    with torch.no_grad():
        as_tuple = model(IDS, return_dict=False)
    assert all(torch.equal(*pair) for pair in zip(as_tuple, run(model, {"input_ids": IDS}), strict=False))


@every_class
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "shards"])
def test_saved_and_loaded_models_are_equal(kind: Any, safe: bool, tmp_path: Any) -> None:
    model = make("K8", kind)
    model.save_pretrained(tmp_path, **({} if safe else {"max_shard_size": "20KB"}))
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(run(loaded.eval()), run(model), rtol=0, atol=0)
    for (name, buffer), (_, wanted) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(buffer, wanted), name


@every_class
def test_mismatched_shapes(kind: Any, tmp_path: Any) -> None:
    make("K8", kind).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="have others, among them"):
        kind.from_pretrained(tmp_path, vocab_size=40)
    loaded = kind.from_pretrained(tmp_path, vocab_size=40, ignore_mismatched_sizes=True)
    assert loaded.get_input_embeddings().a.shape[1] == 40
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@every_class
def test_resizing_the_vocabulary(kind: Any) -> None:
    model = make("K8", kind)
    before, words = run(model), model.get_input_embeddings()
    assert model.resize_token_embeddings() is words
    model.resize_token_embeddings(62)
    assert (model.config.vocab_size, model.get_input_embeddings().num_embeddings) == (62, 62)
    for after, want in zip(run(model), before, strict=True):
        torch.testing.assert_close(after[..., : want.shape[-1]], want)
    output = model.get_output_embeddings()
    if kind in TIED:
        assert isinstance(output, KronDecoder)
        assert output.a is model.get_input_embeddings().a
    model.resize_token_embeddings(45)
    model(IDS)
    with pytest.raises(IndexError, match=r"input_ids: expected indices in \[0, 45\)"):
        model(IDS * 0 + 46)
    assert model.resize_token_embeddings(pad_to_multiple_of=32, mean_resizing=False).num_embeddings == 64


@pytest.mark.parametrize("kind", TIED, ids=lambda kind: kind.__name__)
def test_ties_hold_through_copies_and_files(kind: Any, tmp_path: Any) -> None:
    model = make("K8", kind)
    model.save_pretrained(tmp_path)
    for other in (model, copy.deepcopy(model), kind.from_pretrained(tmp_path)):
        assert other.get_output_embeddings().a is other.get_input_embeddings().a
        assert other.get_output_embeddings().bias is other.cls.predictions.bias
    untied = make("K8", kind, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "untied")
    loaded = kind.from_pretrained(tmp_path / "untied").eval()
    assert type(loaded.get_output_embeddings()) is nn.Linear
    torch.testing.assert_close(run(loaded), run(untied), rtol=0, atol=0)


@every_class
def test_training_reaches_every_parameter_and_checkpointing_changes_no_gradient(kind: Any) -> None:
    model = make("K8", kind, **NO_DROPOUT).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        loss_of(model, kind).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@every_class
def test_outputs_that_are_asked_for(kind: Any) -> None:
    model = make("K8", kind)
    model.set_attn_implementation("eager")
    result = model(IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in result.hidden_states] == [(3, 6, 48)] * 3
    assert [weights.shape for weights in result.attentions] == [(3, 4, 6, 6)] * 2
    embedded = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(
        model(inputs_embeds=embedded, attention_mask=MASK)[0], model(IDS, attention_mask=MASK)[0], rtol=1e-4, atol=1e-4
    )


def test_dtypes_and_attention_by_option(tmp_path: Any) -> None:
    make("K8", KronBertForMaskedLM).save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
