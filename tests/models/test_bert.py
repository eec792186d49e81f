"""The KronBert family: conversion from BERT, files, Auto classes and the features of transformers models."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel
from transformers.initialization import no_init_weights

from kron_kernels import models
from kron_kernels.convert.layers import FACTORED
from kron_kernels.convert.presets import as_kron_config, preset
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, KronBertModel
from kron_kernels.nn import KronLinear, TiedDecoder
from tests.models.bert_cases import IDS, LOW_RANK, MASK, NO_DROPOUT, SIZES, make

HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForQuestionAnswering")
with_every_class = pytest.mark.parametrize("kind", HEADS)


def make_kron(kind: str = "Model", **options) -> nn.Module:
    config = KronBertConfig(kron="K8", **{**SIZES, "initializer_range": 0.02, **options})
    return getattr(models, f"KronBert{kind}")(config).eval()


def make_dense(kind: str = "Model", **options) -> nn.Module:
    return getattr(transformers, f"Bert{kind}")(BertConfig(**SIZES, **options)).eval()


def outputs(model: nn.Module, **options) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(input_ids=IDS, attention_mask=MASK, **options)
    return [value for value in result.values() if isinstance(value, torch.Tensor)]


@with_every_class
@pytest.mark.parametrize("kron", ["K8", LOW_RANK], ids=["K8", "low-rank"])
def test_from_dense_computes_the_reconstructed_model(kind, kron):
    dense = make_dense(kind)
    before = copy.deepcopy(dense.state_dict())
    kron = getattr(models, f"KronBert{kind}").from_dense(dense, kron)
    assert kron.conversion_report.params_after == sum(parameter.numel() for parameter in kron.parameters())
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    rebuilt = copy.deepcopy(dense)
    for name, module in kron.named_modules():
        if isinstance(module, FACTORED):
            rebuilt.get_submodule(name).weight.data = module.dense_weight().detach()
    rebuilt.tie_weights()
    torch.testing.assert_close(outputs(kron), outputs(rebuilt), rtol=1e-4, atol=1e-4)


def test_from_dense_keeps_what_the_dense_model_is():
    dense = BertModel(BertConfig(**SIZES, id2label={0: "a", 1: "b"}), add_pooling_layer=False).to(torch.bfloat16)
    dense.set_attn_implementation("eager")
    kron = KronBertModel.from_dense(dense.train(), "K8")
    assert (kron.pooler, kron.dtype, kron.training) == (None, torch.bfloat16, True)
    assert (kron.config._attn_implementation, kron.config.id2label) == ("eager", {0: "a", 1: "b"})
    kron.embeddings.LayerNorm.weight.data.zero_()
    assert dense.embeddings.LayerNorm.weight.all()


def test_dense_models_and_checkpoints_of_the_wrong_kind(tmp_path):
    with pytest.raises(TypeError, match="dense: expected BertForMaskedLM, got BertModel"):
        KronBertForMaskedLM.from_dense(make_dense())
    with pytest.raises(ValueError, match="model: expected a dense model"):
        KronBertModel.from_dense(make_kron())
    make_dense().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"expected factors, 26 are missing, .*KronBertModel.from_dense"):
        KronBertModel.from_pretrained(tmp_path, config=KronBertConfig(**SIZES))


@with_every_class
def test_save_and_load_through_the_auto_class(kind, tmp_path):
    model = make_kron(kind, num_labels=2)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, KronBertConfig)
    assert config.kron == preset("K8").to_dict()
    auto = getattr(transformers, "AutoModel" + kind.removeprefix("Model"))
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded), outputs(model), strict=True))


def test_saved_names_are_stable_and_tied_factors_and_padding_saved_once(tmp_path):
    model = make_kron("ForMaskedLM")
    model.bert.embeddings.word_embeddings.a.data[:, 0] = 0.25
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    layer = "bert.encoder.layer.0"
    assert {f"{layer}.attention.self.query.b", f"{layer}.output.dense.a", "cls.predictions.bias"} <= names
    assert not [name for name in names if "decoder" in name]
    assert (AutoModel.from_pretrained(tmp_path).embeddings.word_embeddings.a[:, 0] == 0.25).all()


def test_bad_configurations():
    with pytest.raises(ValueError, match=r"preset: expected one of K8, K19, K21, .*, got 'K9'"):
        KronBertConfig(kron="K9")
    with pytest.raises(ValueError, match="preset K21 does not fit hidden_size=200"):
        KronBertConfig(kron="K21", hidden_size=200, intermediate_size=800)
    with pytest.raises(TypeError, match="config: expected a KronConfig, its dict or a preset's name, got int"):
        KronBertConfig(kron=8)
    with pytest.raises(ValueError, match="version: expected 1, 2 or 3, got 7"):
        KronBertConfig(kron={**preset("K8").to_dict(), "version": 7})


def test_initialisation_follows_the_config():
    torch.manual_seed(1)
    model = make_kron("ForMaskedLM", initializer_range=0.1)
    layers = [module for module in model.modules() if isinstance(module, KronLinear)]
    weights = torch.stack([layer.dense_weight() for layer in layers if layer.in_features == layer.out_features])
    torch.testing.assert_close(weights.std(), torch.tensor(0.1), rtol=0.3, atol=0)
    assert not any(layer.bias.any() for layer in layers)
    assert model.get_input_embeddings()(torch.tensor([0, 1])).any(-1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("ForMaskedLM", "position_embeddings", r"every tensor of the encoder, 1 are missing, among them bert\.emb"),
        ("ForMaskedLM", "0.output.dense.a", "expected factors, 1 are missing"),
        ("Model", "pooler", None),
        ("ForSequenceClassification", "classifier", None),
    ],
)
def test_only_pooler_and_head_may_be_missing(kind, part, message):
    model = make_kron(kind)
    state = {name: value for name, value in model.state_dict().items() if part not in name}
    with pytest.raises(OSError, match=message) if message else contextlib.nullcontext():
        type(model).from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_checkpoints_name_their_folder(file, tmp_path):
    model = make_kron()
    model.config.save_pretrained(tmp_path)
    {"model.safetensors": save_file, "pytorch_model.bin": torch.save}[file](model.state_dict(), tmp_path / file)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:5000])
    with pytest.raises(OSError, match=rf"{tmp_path}: damaged checkpoint: \S+"):
        KronBertModel.from_pretrained(tmp_path)


@with_every_class
def test_low_rank_models_save_load_and_train(kind, tmp_path):
    model = make("low-rank", getattr(models, f"KronBert{kind}"), **NO_DROPOUT)
    layer = (model if kind == "Model" else model.bert).encoder.layer[1]
    assert (layer.output.dense.rank, layer.intermediate.dense.rank) == (20, 16)
    words = model.get_input_embeddings()
    words.places.copy_(torch.randperm(50))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.kron == LOW_RANK.to_dict()
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded.eval()), outputs(model), strict=True))
    sum(value.square().sum() for value in model.train()(IDS).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_head_tied_to_bands_follows_copies_files_and_sizes(tmp_path):
    model = make("low-rank", KronBertForMaskedLM)
    model.bert.embeddings.word_embeddings.places.copy_(torch.randperm(50))
    own = {"bert.embeddings.word_embeddings": LOW_RANK.rules["embedding"]}
    model.config.kron = replace(LOW_RANK, layers={**LOW_RANK.layers, **own}).to_dict()
    for size in (62, 45):
        before = outputs(model)[0]
        model.resize_token_embeddings(size)
        kept = min(size, before.shape[-1])
        torch.testing.assert_close(outputs(model)[0][..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert not [name for name in names if "decoder" in name]
    assert names["bert.embeddings.word_embeddings.tables.2"].shape[1] == 4
    for other in (model, copy.deepcopy(model), KronBertForMaskedLM.from_pretrained(tmp_path).eval()):
        decoder = other.get_output_embeddings()
        assert type(decoder) is TiedDecoder
        assert decoder.embedding is other.get_input_embeddings()
        assert decoder.bias is other.cls.predictions.bias
        assert torch.equal(outputs(other)[0], outputs(model)[0])
    with pytest.raises(IndexError, match=r"input_ids: expected indices in \[0, 45\), got 45"):
        model(torch.tensor([[45]]))
    with pytest.raises(ValueError, match="bands: expected positive counts that sum to 1, got"):
        model.resize_token_embeddings(1)
    rule = as_kron_config(model.config.kron).rules["embedding"]
    assert sum(tokens for tokens, _ in rule.resolve(45)) == 45


def test_low_rank_checkpoints_lack_nothing(tmp_path):
    model = make("low-rank")
    for part in ("tables.1", "projections.0", "means", "places", "0.output.dense.v"):
        state = {name: value for name, value in model.state_dict().items() if not name.endswith(part)}
        with pytest.raises(OSError, match=rf"expected factors, \d are missing, among them .*{part}"):
            KronBertModel.from_pretrained(None, config=model.config, state_dict=state)


def test_without_initialisation_tokens_still_have_their_places():
    with no_init_weights():
        model = KronBertModel(KronBertConfig(kron=LOW_RANK, **SIZES))
    assert model.embeddings.word_embeddings.places.tolist() == list(range(50))
    assert torch.equal(model.embeddings.position_ids, torch.arange(20)[None])


def test_an_encoder_remembers_that_it_has_no_pooler(tmp_path):
    KronBertModel(KronBertConfig(kron=LOW_RANK, **SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.pooler is None
    assert not any(info.values())
    assert KronBertModel.from_pretrained(tmp_path, add_pooling_layer=True).pooler is not None
