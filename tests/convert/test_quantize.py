"""int8 factors: what is stored, what it costs in accuracy, files, ties, and the errors."""

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
from kron_kernels.convert.quantize import hidden_agreement, quantize_, weight_bytes
from kron_kernels.models import KronBertConfig, KronBertForMaskedLM, KronBertModel
from kron_kernels.nn import Int8Factored, Int8KronDecoder, KronEmbedding, KronLinear

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
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make_model(kind: type[Any] = KronBertModel, kron: str = "K8") -> Any:
    return kind(KronBertConfig(kron=kron, initializer_range=0.2, **SIZES)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH)[0]


def test_report_of_a_model() -> None:
    model = make_model()
    dense = {name: module.dense_weight().detach().clone() for name, module in model.named_modules() if is_kron(module)}
    parameters, before = count_parameters(model), weight_bytes(model)
    report = quantize_(model)
    assert report.bytes_before == before == sum(t.nbytes for t in make_model().state_dict().values())
    assert report.bytes_after == weight_bytes(model) < before
    assert count_parameters(model) == parameters
    assert [layer.name for layer in report.layers] == list(dense)
    for layer in report.layers:
        module: Any = model.get_submodule(layer.name)
        error = float((module.dense_weight().detach() - dense[layer.name]).norm() / dense[layer.name].norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-3)
        assert 0.001 < error < 0.02
        assert layer.bytes_after == sum(t.nbytes for t in module.state_dict().values()) < layer.bytes_before
    assert json.loads(json.dumps(report.to_dict()))["bytes_after"] == report.bytes_after
    assert model.config.kron["weight_dtype"] == "int8"


def is_kron(module: nn.Module) -> bool:
    return isinstance(module, (KronLinear, KronEmbedding))


@DTYPES
def test_hidden_states_hardly_change(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    quantized = copy.deepcopy(model)
    quantize_(quantized)
    assert 0.999 < hidden_agreement(model, quantized, [BATCH]) < 1 - 1e-7


def test_agreement_leaves_padding_out() -> None:
    model, other = make_model(), make_model()
    with torch.no_grad():
        states = [each(**BATCH).last_hidden_state for each in (model, other)]
    cosines = torch.cosine_similarity(*states, dim=-1)
    wanted = float(cosines[BATCH["attention_mask"].bool()].double().mean())
    assert hidden_agreement(model, other, [BATCH]) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="batches: expected at least one token, got none"):
        hidden_agreement(model, model, [])


def test_files_hold_int8_and_load_through_the_auto_class(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    quantize_(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["embeddings.word_embeddings.a_int8"].dtype is torch.int8
    assert stored["encoder.layer.1.intermediate.dense.b_int8"].dtype is torch.int8
    assert "encoder.layer.1.intermediate.dense.b" not in stored
    loaded, info = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is KronBertModel
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(loaded.eval()), output(model))


def test_a_tied_decoder_stays_tied(tmp_path: Path) -> None:
    model = make_model(KronBertForMaskedLM)
    before = output(model)
    quantize_(model)
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(decoder) is Int8KronDecoder
    assert decoder.embedding is embedding
    assert decoder.bias is model.cls.predictions.bias
    after = output(model)
    torch.testing.assert_close(after, before, rtol=0, atol=0.05 * float(before.abs().max()))
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "decoder" in name]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().embedding is loaded.get_input_embeddings()
    assert torch.equal(output(loaded), after)


def test_kronify_makes_int8_as_quantize_does() -> None:
    dense = BertForMaskedLM(BertConfig(initializer_range=0.2, **SIZES)).eval()
    once, twice = copy.deepcopy(dense), copy.deepcopy(dense)
    kronify_(once, "K8", weight_dtype="int8")
    kronify_(twice, "K8")
    quantize_(twice)
    assert once.config.kron == twice.config.kron
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
    assert torch.equal(output(once), output(twice))


def test_checkpoints_of_the_other_weight_dtype_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "float")
    quantize_(model)
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(OSError, match=r"float: expected int8 factors, .* got factors in floating point"):
        KronBertModel.from_pretrained(tmp_path / "float", config=model.config)
    with pytest.raises(OSError, match=r"int8: expected factors in floating point, .* got int8 ones"):
        KronBertModel.from_pretrained(tmp_path / "int8", config=make_model().config)


def test_bad_requests_leave_the_model_alone() -> None:
    with pytest.raises(ValueError, match=r"model: expected Kronecker layers \(kronify_ makes them\), got none"):
        quantize_(BertModel(BertConfig(**SIZES)))
    model = make_model()
    model.encoder.layer[1].output.dense.b.data[0, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"model: expected finite factors, got NaN or inf in encoder.layer.1.output"):
        quantize_(model)
    assert not any(isinstance(module, Int8Factored) for module in model.modules())
    assert "weight_dtype" not in model.config.kron

    class Mine(KronLinear):
        pass

    with pytest.raises(ValueError, match="expected 0 to be KronLinear or KronEmbedding, got Mine"):
        quantize_(nn.Sequential(Mine(4, 4, ((2, 2), (2, 2)))))
    model = make_model()
    quantize_(model)
    with pytest.raises(ValueError, match=r"model: expected factors in floating point, got int8 ones in embeddings"):
        quantize_(model)
    with pytest.raises(ValueError, match="expected factors in floating point to resize, got int8 ones"):
        model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="weight_dtype: expected None or 'int8', got 'int4'"):
        kronify_(BertModel(BertConfig(**SIZES)), "K8", weight_dtype="int4")
