"""The KronBert family: conversion from BERT, files, Auto classes and the features of transformers models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from kron_kernels.convert.presets import KronConfig, ShapeRule, preset
from kron_kernels.models import (
    KronBertConfig,
    KronBertForMaskedLM,
    KronBertForPreTraining,
    KronBertForQuestionAnswering,
    KronBertForSequenceClassification,
    KronBertModel,
)
from kron_kernels.nn import KronDecoder, KronEmbedding, KronLinear

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
IDS = torch.tensor([[5, 9, 2, 30, 7], [8, 3, 40, 0, 0]])
MASK = (IDS != 0).long()
CLASSES = {
    "model": (KronBertModel, BertModel, AutoModel),
    "masked-lm": (KronBertForMaskedLM, BertForMaskedLM, AutoModelForMaskedLM),
    "pre-training": (KronBertForPreTraining, BertForPreTraining, AutoModelForPreTraining),
    "classification": (
        KronBertForSequenceClassification,
        BertForSequenceClassification,
        AutoModelForSequenceClassification,
    ),
    "question-answering": (KronBertForQuestionAnswering, BertForQuestionAnswering, AutoModelForQuestionAnswering),
}
with_every_class = pytest.mark.parametrize("kind", CLASSES)


def make_kron(kind: str = "model", kron: str = "K8", **options) -> nn.Module:
    return CLASSES[kind][0](KronBertConfig(kron=kron, **SIZES, **options)).eval()


def make_dense(kind: str = "model", **options) -> nn.Module:
    return CLASSES[kind][1](BertConfig(initializer_range=0.2, **SIZES, **options)).eval()


def outputs(model: nn.Module, **options) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(input_ids=IDS, attention_mask=MASK, **options)
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@with_every_class
def test_from_dense_computes_the_reconstructed_model(kind):
    dense = make_dense(kind)
    before = copy.deepcopy(dense.state_dict())
    kron = CLASSES[kind][0].from_dense(dense, "K8")
    assert type(kron) is CLASSES[kind][0]
    assert kron.conversion_report.params_after == sum(parameter.numel() for parameter in kron.parameters())
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    rebuilt = copy.deepcopy(dense)
    for name, module in kron.named_modules():
        if isinstance(module, (KronLinear, KronEmbedding)):
            rebuilt.get_submodule(name).weight.data = module.dense_weight().detach()
    rebuilt.tie_weights()
    assert_close(outputs(kron), outputs(rebuilt))


def test_full_terms_reproduce_the_dense_model():
    exact = KronConfig(
        {
            "attention": ShapeRule(b=(2, 2), terms=4),
            "ffn_in": ShapeRule(a=(4, 2), terms=8),
            "ffn_out": ShapeRule(a=(2, 4), terms=8),
            "embedding": ShapeRule(b=(1, 4), terms=4),
        }
    )
    dense = make_dense("pre-training")
    assert_close(outputs(KronBertForPreTraining.from_dense(dense, exact)), outputs(dense))


def test_from_dense_keeps_what_the_dense_model_is():
    dense = BertModel(BertConfig(**SIZES), add_pooling_layer=False).to(torch.bfloat16)
    dense.set_attn_implementation("eager")
    kron = KronBertModel.from_dense(dense.train(), "K8")
    assert kron.pooler is None
    assert kron.dtype is torch.bfloat16
    assert kron.training
    assert kron.config._attn_implementation == "eager"
    kron.embeddings.LayerNorm.weight.data.zero_()
    assert dense.embeddings.LayerNorm.weight.all()
    classifier = make_dense("classification", num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    assert KronBertForSequenceClassification.from_dense(classifier).config.id2label == {0: "a", 1: "b", 2: "c"}


def test_from_dense_wants_the_class_it_derives_from():
    with pytest.raises(TypeError, match="dense: expected BertForMaskedLM, got BertModel"):
        KronBertForMaskedLM.from_dense(make_dense())
    with pytest.raises(ValueError, match="model: expected a dense model"):
        KronBertModel.from_dense(make_kron())


@with_every_class
def test_save_and_load_through_the_auto_class(kind, tmp_path):
    model = make_kron(kind, num_labels=2)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, KronBertConfig)
    assert config.kron == preset("K8").to_dict()
    for auto in CLASSES[kind]:
        if auto is not CLASSES[kind][1]:
            loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
            assert type(loaded) is type(model)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            for actual, expected in zip(outputs(loaded), outputs(model), strict=True):
                assert torch.equal(actual, expected)


def test_saved_names_are_stable_and_tied_factors_saved_once(tmp_path):
    from safetensors import safe_open

    make_kron("masked-lm").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    layer = "bert.encoder.layer.0"
    assert {
        "bert.embeddings.word_embeddings.a",
        "bert.embeddings.word_embeddings.b",
        f"{layer}.attention.self.query.a",
        f"{layer}.attention.output.dense.b",
        f"{layer}.intermediate.dense.bias",
        f"{layer}.output.dense.a",
        "cls.predictions.bias",
    } <= names
    assert not [name for name in names if "decoder" in name]


def test_head_models_load_from_the_encoder_and_back(tmp_path):
    encoder = make_kron()
    encoder.save_pretrained(tmp_path)
    head = KronBertForMaskedLM.from_pretrained(tmp_path)
    embedding = head.bert.embeddings.word_embeddings
    assert head.cls.predictions.decoder.a is embedding.a
    assert torch.equal(embedding.a, encoder.embeddings.word_embeddings.a)
    head.save_pretrained(tmp_path / "head")
    back = AutoModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    assert torch.equal(back.encoder.layer[1].output.dense.a, encoder.encoder.layer[1].output.dense.a)


def test_loading_in_half_precision(tmp_path):
    make_kron().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_loaded_padding_row_is_kept(tmp_path):
    model = make_kron()
    model.embeddings.word_embeddings.a.data[:, 0] = 0.25
    model.save_pretrained(tmp_path)
    assert (AutoModel.from_pretrained(tmp_path).embeddings.word_embeddings.a[:, 0] == 0.25).all()


def test_initialisation_leaves_loaded_parameters_alone():
    model = make_kron()
    model.embeddings.word_embeddings.a.data[:, 0] = 0.25
    before = copy.deepcopy(model.state_dict())
    for tensor in (*model.modules(), *model.parameters()):
        tensor._is_hf_initialized = isinstance(tensor, nn.Parameter)
    model.initialize_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dense_checkpoint_is_refused(tmp_path):
    make_dense().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"expected Kronecker factors, 26 are missing, .*KronBertModel.from_dense"):
        KronBertModel.from_pretrained(tmp_path, config=KronBertConfig(**SIZES))


def test_damaged_and_missing_checkpoints_name_their_folder(tmp_path):
    make_kron().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(OSError, match=rf"{tmp_path}: damaged checkpoint"):
        AutoModel.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=str(tmp_path)):
        AutoModel.from_pretrained(tmp_path)


def test_bad_configurations():
    with pytest.raises(
        ValueError, match="preset: expected one of K8, K19, K21, KnGPT2, TQCompressor, TQCompressor-QKV, got 'K9'"
    ):
        KronBertConfig(kron="K9")
    with pytest.raises(ValueError, match="preset K21 does not fit hidden_size=200"):
        KronBertConfig(kron="K21", hidden_size=200, intermediate_size=800)
    with pytest.raises(TypeError, match="config: expected a KronConfig, its dict or a preset's name, got int"):
        KronBertConfig(kron=8)
    with pytest.raises(ValueError, match="version: expected 1 or 2, got 7"):
        KronBertConfig(kron={**preset("K8").to_dict(), "version": 7})


def test_config_of_a_dense_model_survives_json():
    config = KronBertConfig.from_dense(BertConfig(**SIZES, num_labels=3), preset("K19"))
    again = KronBertConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.model_type, again.num_labels, again.vocab_size) == ("kron_bert", 3, 50)
    assert KronConfig.from_dict(again.kron) == preset("K19")
    assert again.kron == KronBertConfig(kron=preset("K19")).kron == KronBertConfig(kron="K19").kron


@with_every_class
def test_initialisation_follows_the_config(kind):
    torch.manual_seed(1)
    model = make_kron(kind, initializer_range=0.1)
    layers = [module for module in model.modules() if isinstance(module, KronLinear)]
    weights = torch.stack([layer.dense_weight() for layer in layers if layer.in_features == layer.out_features])
    torch.testing.assert_close(weights.std(), torch.tensor(0.1), rtol=0.3, atol=0)
    assert all(torch.equal(layer.bias, torch.zeros_like(layer.bias)) for layer in layers)
    embedding = model.get_input_embeddings()
    assert not embedding(torch.tensor(0)).any()
    assert embedding(torch.tensor(1)).any()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    if kind in ("masked-lm", "pre-training"):
        assert isinstance(model.get_output_embeddings(), KronDecoder)
        assert model.get_output_embeddings().a is embedding.a
        assert model.get_output_embeddings().bias is model.cls.predictions.bias


def test_an_untied_decoder_is_dense():
    decoder = make_kron("masked-lm", tie_word_embeddings=False).get_output_embeddings()
    assert type(decoder) is nn.Linear
    assert not decoder.weight.is_meta


class RealAllocations(TorchDispatchMode):
    """Notes the largest tensor made outside the meta device."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.numel = max(self.numel, result.numel())
        return result


def test_construction_allocates_no_dense_weight():
    with RealAllocations() as seen:
        model = make_kron("masked-lm")
    assert seen.numel == max(parameter.numel() for parameter in model.parameters())
    assert seen.numel < SIZES["hidden_size"] * SIZES["intermediate_size"]


@with_every_class
def test_training_reaches_every_parameter_under_gradient_checkpointing(kind):
    labels = {
        "masked-lm": {"labels": IDS},
        "pre-training": {"labels": IDS, "next_sentence_label": torch.tensor([0, 1])},
        "classification": {"labels": torch.tensor([0, 1])},
        "question-answering": {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 2])},
    }
    model = make_kron(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        result = model(input_ids=IDS, attention_mask=MASK, **labels.get(kind, {}))
        loss = result.pooler_output.square().sum() if kind == "model" else result.loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients[0].values())
    assert all(gradient.any() for name, gradient in gradients[0].items() if name.endswith("output.dense.a"))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_intermediate_outputs_and_attention_backends_agree():
    model = make_kron(initializer_range=0.2)
    assert model.config._attn_implementation == "sdpa"
    sdpa = outputs(model)
    model.set_attn_implementation("eager")
    assert_close(outputs(model), sdpa)
    result = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert len(result.hidden_states) == 3
    assert result.attentions[0].shape == (2, 4, 5, 5)
    embedded = model.get_input_embeddings()(IDS)
    assert_close([model(inputs_embeds=embedded).last_hidden_state], [model(IDS).last_hidden_state])


@pytest.mark.parametrize("size", [60, 45])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_the_vocabulary(size, tied, tmp_path):
    model = make_kron("masked-lm", initializer_range=0.2, tie_word_embeddings=tied)
    model.cls.predictions.decoder.bias.data.normal_()
    before, old = outputs(model)[0], model.get_input_embeddings()
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.vocab_size == size
    after, kept = outputs(model)[0], min(size, 50)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    assert after.shape[-1] == size
    if size > 50:
        torch.testing.assert_close(model.get_input_embeddings().a[:, 50:].mean(1), old.a.mean(1))
    if tied:
        assert model.get_output_embeddings().a is model.get_input_embeddings().a
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(AutoModelForMaskedLM.from_pretrained(tmp_path))[0], after)


def test_resizing_options():
    model = make_kron()
    embedding = model.get_input_embeddings()
    assert model.resize_token_embeddings() is embedding
    assert model.resize_token_embeddings(pad_to_multiple_of=32, mean_resizing=False).num_embeddings == 64
    assert model.get_input_embeddings().a[:, 50:].std() > 0


def test_copies_keep_ties_and_outputs():
    model = make_kron("masked-lm")
    clone = copy.deepcopy(model)
    assert clone.get_output_embeddings().a is clone.get_input_embeddings().a
    assert clone.get_output_embeddings().a is not model.get_output_embeddings().a
    assert torch.equal(outputs(clone)[0], outputs(model)[0])
