"""Factors stored as integers: what it costs in accuracy and bytes, files, ties, and the errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from kron_kernels.convert.counting import count_parameters
from kron_kernels.convert.kronify import kronify_
from kron_kernels.convert.layers import FACTORED
from kron_kernels.convert.quantize import hidden_agreement, quantize_, weight_bytes
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, KronBertModel
from kron_kernels.nn import KronLinear, TiedDecoder, is_quantized
from tests.models.bert_cases import LOW_RANK

SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
IDS = torch.tensor([[5, 9, 2, 30, 7], [8, 3, 40, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
KINDS = pytest.mark.parametrize(
    ("kron", "weight_dtype", "most"),
    [("K8", "int8", 0.015), ("K8", "int4", 0.15), (LOW_RANK, "int8", 0.02), (LOW_RANK, "int4", 0.2)],
    ids=["K8-int8", "K8-int4", "low-rank-int8", "low-rank-int4"],
)


def make_model(kind: type[Any] = KronBertModel, kron: Any = "K8") -> Any:
    return kind(KronBertConfig(kron=kron, initializer_range=0.2, **SIZES)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH)[0]


@KINDS
def test_report_of_a_model(kron: Any, weight_dtype: str, most: float) -> None:
    model = make_model(kron=kron)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FACTORED)}
    dense = {name: module.dense_weight().detach().clone() for name, module in layers.items()}
    parameters, before = count_parameters(model), weight_bytes(model)
    report = quantize_(model, weight_dtype=weight_dtype)
    assert report.bytes_before == before == sum(t.nbytes for t in make_model(kron=kron).state_dict().values())
    assert report.bytes_after == weight_bytes(model) < before
    assert count_parameters(model) == parameters
    assert [layer.name for layer in report.layers] == list(dense)
    for layer in report.layers:
        module: Any = model.get_submodule(layer.name)
        error = float((module.dense_weight().detach() - dense[layer.name]).norm() / dense[layer.name].norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-3)
        assert most / 20 < error < most
        assert layer.bytes_after == sum(t.nbytes for t in module.state_dict().values()) < layer.bytes_before
    assert json.loads(json.dumps(report.to_dict()))["bytes_after"] == report.bytes_after
    assert model.config.kron["weight_dtype"] == report.weight_dtype == weight_dtype


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "least"),
    [(torch.float32, "int8", 0.999), (torch.bfloat16, "int8", 0.999), (torch.bfloat16, "int4", 0.97)],
)
def test_hidden_states_hardly_change(dtype: torch.dtype, weight_dtype: str, least: float) -> None:
    model = make_model().to(dtype)
    report = quantize_(model, [BATCH], weight_dtype)
    assert report.agreement is not None
    assert least < report.agreement < 1 - 1e-7
    kept = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    assert set(kept.values()) == {dtype}
    assert {"embeddings.position_embeddings.weight", "embeddings.LayerNorm.weight"} <= kept.keys()
    assert {"encoder.layer.0.output.dense.bias", "encoder.layer.0.attention.self.query.b"} <= kept.keys()


def test_agreement_leaves_padding_out() -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        states = [each(**BATCH).last_hidden_state for each in (model, other)]
    cosines = torch.cosine_similarity(*states, dim=-1)
    wanted = float(cosines[BATCH["attention_mask"].bool()].double().mean())
    assert hidden_agreement(model, other, [BATCH]) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="batches: expected at least one token, got none"):
        hidden_agreement(model, model, [])


@KINDS
def test_files_hold_integers_and_load_through_the_auto_class(
    kron: Any, weight_dtype: str, most: float, tmp_path: Path
) -> None:
    model = make_model(kron=kron).bfloat16()
    quantize_(model, weight_dtype=weight_dtype)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    words, factor = ("a", "b") if kron == "K8" else ("tables.2", "u")
    assert stored[f"embeddings.word_embeddings.{words}_{weight_dtype}"].element_size() == 1
    assert stored[f"encoder.layer.1.intermediate.dense.{factor}_{weight_dtype}"].element_size() == 1
    assert f"encoder.layer.1.intermediate.dense.{factor}" not in stored
    loaded, info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is KronBertModel
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(loaded.eval()), output(model))


@pytest.mark.parametrize("kron", ["K8", LOW_RANK], ids=["K8", "low-rank"])
def test_a_tied_decoder_stays_tied(kron: Any, tmp_path: Path) -> None:
    model = make_model(KronBertForMaskedLM, kron)
    before = output(model)
    quantize_(model)
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(decoder) is TiedDecoder
    assert decoder.embedding is embedding
    assert decoder.bias is model.cls.predictions.bias
    after = output(model)
    torch.testing.assert_close(after, before, rtol=0, atol=0.1 * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "decoder" in name]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().embedding is loaded.get_input_embeddings()
    assert torch.equal(output(loaded), after)


@pytest.mark.parametrize(("kron", "weight_dtype"), [("K8", "int8"), (LOW_RANK, "int4")], ids=["K8", "low-rank"])
def test_kronify_stores_as_quantize_does(kron: Any, weight_dtype: str) -> None:
    dense = BertForMaskedLM(BertConfig(initializer_range=0.2, **SIZES)).eval()
    once, twice = copy.deepcopy(dense), copy.deepcopy(dense)
    report = kronify_(once, kron, weight_dtype=weight_dtype)
    assert report.params_after == kronify_(twice, kron).params_after
    quantize_(twice, weight_dtype=weight_dtype)
    assert once.config.kron == twice.config.kron
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
    assert torch.equal(output(once), output(twice))


@pytest.mark.parametrize("kron", ["K8", LOW_RANK], ids=["K8", "low-rank"])
def test_checkpoints_of_another_weight_dtype_are_refused(kron: Any, tmp_path: Path) -> None:
    configs = {}
    for kind in ("floating point", "int8", "int4"):
        model = make_model(kron=kron)
        if kind != "floating point":
            quantize_(model, weight_dtype=kind)
        model.save_pretrained(tmp_path / kind)
        configs[kind] = model.config
    for kind in configs:
        for wanted in configs.keys() - {kind}:
            match = f"{kind}: expected factors in {wanted}, as the configuration says, got {kind}; load them with the"
            with pytest.raises(OSError, match=match):
                KronBertModel.from_pretrained(tmp_path / kind, config=configs[wanted])


def test_bad_requests_leave_the_model_alone() -> None:
    with pytest.raises(ValueError, match=r"model: expected factored layers \(kronify_ makes them\), got none"):
        quantize_(BertModel(BertConfig(**SIZES)))
    model = make_model()
    model.encoder.layer[1].output.dense.b.data[0, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"model: expected finite factors, got NaN or inf in encoder.layer.1.output"):
        quantize_(model)
    assert not is_quantized(model)
    assert "weight_dtype" not in model.config.kron

    class Mine(KronLinear):
        pass

    with pytest.raises(ValueError, match=r"expected 0 to be one of KronLinear, .*, AdaptiveEmbedding, got Mine"):
        quantize_(nn.Sequential(Mine(4, 4, ((2, 2), (2, 2)))))
    model = make_model()
    quantize_(model)
    with pytest.raises(ValueError, match="expected factors in floating point, got stored integers in embeddings"):
        quantize_(model)
    with pytest.raises(ValueError, match="expected factors in floating point to resize, got integers"):
        model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="weight_dtype: expected 'int8' or 'int4', got 'int2'"):
        kronify_(BertModel(BertConfig(**SIZES)), "K8", weight_dtype="int2")
    with pytest.raises(ValueError, match="weight_dtype: expected 'int8' or 'int4', got 'fp8'"):
        quantize_(make_model(), weight_dtype="fp8")
