"""The KronBert family: conversion from BERT, files, Auto classes and the features of transformers models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
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
from transformers.initialization import no_init_weights

from kron_kernels.convert.presets import preset
from kron_kernels.models import (
    KronBertConfig,
    KronBertForMaskedLM,
    KronBertForPreTraining,
    KronBertForQuestionAnswering,
    KronBertForSequenceClassification,
    KronBertModel,
)
from kron_kernels.nn import KronDecoder, KronEmbedding, KronLinear
from tests.models.bert_cases import IDS, MASK, SIZES

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
    return CLASSES[kind][0](KronBertConfig(kron=kron, **{**SIZES, "initializer_range": 0.02, **options})).eval()


def make_dense(kind: str = "model", **options) -> nn.Module:
    return CLASSES[kind][1](BertConfig(**SIZES, **options)).eval()


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


def test_buffers_are_right_without_weight_initialisation(monkeypatch):
    monkeypatch.setattr(
        nn.Module, "to_empty", lambda self, device: self._apply(lambda t: torch.full_like(t, 7, device=device))
    )
    with no_init_weights():
        model = make_kron("masked-lm")
    embeddings = model.bert.embeddings
    assert torch.equal(embeddings.position_ids, torch.arange(20)[None])
    assert torch.equal(embeddings.token_type_ids, torch.zeros(1, 20, dtype=torch.long))


@with_every_class
def test_the_config_switches_gradient_checkpointing_on(kind):
    assert make_kron(kind, gradient_checkpointing=True).is_gradient_checkpointing
    assert not make_kron(kind).is_gradient_checkpointing


def without(model, part):
    return {name: value for name, value in model.state_dict().items() if part not in name}


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("model", "0.output.LayerNorm.weight", "every tensor of the encoder, 1 are missing, among them encoder"),
        ("masked-lm", "position_embeddings", r"every tensor of the encoder, 1 are missing, among them bert\.emb"),
        ("masked-lm", "0.output.dense.a", "Kronecker factors, 1 are missing"),
        ("model", "pooler", None),
        ("classification", "classifier", None),
    ],
)
def test_only_pooler_and_head_may_be_missing(kind, part, message):
    model = make_kron(kind)
    options = {"config": model.config, "state_dict": without(model, part)}
    if message is None:
        type(model).from_pretrained(None, **options)
    else:
        with pytest.raises(OSError, match=message):
            type(model).from_pretrained(None, **options)


def test_a_checkpoint_of_another_preset(tmp_path):
    make_kron().save_pretrained(tmp_path)
    config = KronBertConfig(kron="K21", **SIZES)
    text = (
        r"26 parameters have others, among them embeddings.word_embeddings.a: expected \(1, 50, 3\), got \(1, 50, 6\)"
    )
    for error in (RuntimeError, OSError):  # transformers' and ours
        with pytest.raises(error, match=text):
            AutoModel.from_pretrained(tmp_path, config=config)
    model = KronBertModel.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().a.shape == (1, 50, 3)


@pytest.mark.parametrize(
    ("file", "kept"), [("model.safetensors", 5), ("model.safetensors", -100), ("pytorch_model.bin", 5000)]
)
def test_damaged_checkpoints_name_their_folder(file, kept, tmp_path):
    model = make_kron()
    model.save_pretrained(tmp_path)
    if file.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / file)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:kept])
    with pytest.raises(OSError, match=rf"{tmp_path}: damaged checkpoint: \S+"):
        AutoModel.from_pretrained(tmp_path)
